#include "utf8.h"

namespace skipvision {

Utf8Head utf8_head(std::string_view text) {
  auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  std::uint8_t first = byte(0);
  if (first < 0x80) return {Utf8Head::kCharacter, 1, first};
  std::size_t size = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4) return {};
  char32_t code = first & (0x7F >> size);
  for (std::size_t i = 1; i < size; ++i) {
    if (i == text.size()) return {Utf8Head::kIncomplete, i};
    std::uint8_t low = 0x80, high = 0xBF;
    if (i == 1 && first == 0xE0) low = 0xA0;   // overlong
    if (i == 1 && first == 0xED) high = 0x9F;  // surrogates
    if (i == 1 && first == 0xF0) low = 0x90;   // overlong
    if (i == 1 && first == 0xF4) high = 0x8F;  // past U+10FFFF
    if (byte(i) < low || byte(i) > high) return {Utf8Head::kInvalid, i};
    code = code << 6 | (byte(i) & 0x3F);
  }
  return {Utf8Head::kCharacter, size, code};
}

bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    Utf8Head head = utf8_head(text);
    if (head.kind != Utf8Head::kCharacter) return false;
    text.remove_prefix(head.bytes);
  }
  return true;
}

void append_utf8(std::string& text, char32_t code) {
  auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  auto rest = [&](int shift) { put(0x80 | (code >> shift & 0x3F)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xC0 | code >> 6);
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    rest(6);
  } else {
    put(0xF0 | code >> 18);
    rest(12);
    rest(6);
  }
  rest(0);
}

bool is_space(char32_t code) {
  return (code >= 0x09 && code <= 0x0D) || (code >= 0x1C && code <= 0x20) || code == 0x85 ||
         code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
         code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

std::string_view strip(std::string_view text) {
  std::size_t at = 0, begin = std::string_view::npos, end = 0;
  while (at < text.size()) {
    Utf8Head head = utf8_head(text.substr(at));
    if (!is_space(head.code)) {
      if (begin == std::string_view::npos) begin = at;
      end = at + head.bytes;
    }
    at += head.bytes;
  }
  return begin == std::string_view::npos ? std::string_view() : text.substr(begin, end - begin);
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  for (std::size_t at = 0;;) {
    std::size_t next = from.empty() ? std::string_view::npos : text.find(from, at);
    result += text.substr(at, next - at);
    if (next == std::string_view::npos) return result;
    result += to;
    at = next + from.size();
  }
}

}  // namespace skipvision
