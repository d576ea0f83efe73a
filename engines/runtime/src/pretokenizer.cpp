#define PCRE2_CODE_UNIT_WIDTH 8
#include "pretokenizer.h"

#include <pcre2.h>
#include <utf8proc.h>

#include <array>
#include <cctype>
#include <cstdlib>

#include "skipvision/skipvision.h"
#include "utf8.h"

namespace skipvision {
namespace {

constexpr char kGpt2[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

bool starts_with(std::string_view text, std::string_view start) {
  return text.substr(0, start.size()) == start;
}

/// The text between matches and, with `keep_matches`, the matches.
std::vector<std::string> cut(const Regex& regex, const std::string& word, bool keep_matches,
                             bool keep_between) {
  std::vector<std::string> words;
  std::size_t at = 0;
  auto put = [&](std::size_t begin, std::size_t end, bool keep) {
    if (keep && begin < end) words.push_back(word.substr(begin, end - begin));
  };
  for (auto [begin, end] : regex.find(word)) {
    put(at, begin, keep_between);
    put(begin, end, keep_matches);
    at = end;
  }
  put(at, word.size(), keep_between);
  return words;
}

std::string quoted(const std::string& text) {
  std::string pattern;
  for (char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && !std::isalnum(static_cast<unsigned char>(c)))
      pattern += '\\';
    pattern += c;
  }
  return pattern;
}

/// {"String": ...} or {"Regex": ...} as a regular expression.
std::string pattern_of(const Field& pattern) {
  return pattern.has("Regex") ? pattern.at("Regex").text() : quoted(pattern.at("String").text());
}

std::string unicode_form(const std::string& text, utf8proc_option_t options) {
  utf8proc_uint8_t* result = nullptr;
  auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                           static_cast<utf8proc_ssize_t>(text.size()), &result, options);
  std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owner(result, std::free);
  if (size < 0) throw Error("the prompt is not UTF-8");
  return {reinterpret_cast<const char*>(result), static_cast<std::size_t>(size)};
}

void add_normalizer(const Field& field, std::vector<Normalizer>& steps) {
  std::string type = field.at("type").text();
  if (type == "Sequence") {
    for (const Field& item : field.at("normalizers").items()) add_normalizer(item, steps);
  } else if (type == "NFC" || type == "NFKC") {
    int compat = type == "NFKC" ? UTF8PROC_COMPAT : 0;
    auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE | compat);
    steps.push_back([options](const std::string& text) { return unicode_form(text, options); });
  } else if (type == "Prepend") {
    std::string start = field.at("prepend").text();
    steps.push_back(
        [start](const std::string& text) { return text.empty() ? text : start + text; });
  } else if (type == "Replace") {
    if (!field.at("pattern").has("String")) field.at("pattern").fail("only String is supported");
    std::string from = field.at("pattern").at("String").text();
    std::string to = field.at("content").text();
    steps.push_back([from, to](const std::string& text) { return replace_all(text, from, to); });
  } else {
    field.at("type").fail("normalizer '" + type + "' is not supported");
  }
}

void add_byte_level(const Field& field, std::vector<Splitter>& steps) {
  bool prefix = field.flag_or("add_prefix_space", true);
  std::shared_ptr<Regex> regex;
  if (field.flag_or("use_regex", true)) regex = std::make_shared<Regex>(kGpt2, field);
  steps.push_back([prefix, regex](const std::string& text, bool) {
    std::string word = prefix && !starts_with(text, " ") ? " " + text : text;
    std::vector<std::string> words = {word};
    if (regex) words = cut(*regex, word, true, true);
    for (std::string& bytes : words) {
      std::string characters;
      for (char byte : bytes) characters += byte_character(static_cast<std::uint8_t>(byte));
      bytes = characters;
    }
    return words;
  });
}

void add_metaspace(const Field& field, std::vector<Splitter>& steps) {
  std::string mark = field.text_or("replacement", "\u2581");
  std::string scheme = field.text_or("prepend_scheme", "always");
  if (field.has("add_prefix_space") && !field.flag_or("add_prefix_space", true)) scheme = "never";
  if (scheme != "always" && scheme != "first" && scheme != "never")
    field.at("prepend_scheme").fail("'" + scheme + "' is not supported");
  bool split = field.flag_or("split", true);
  steps.push_back([mark, scheme, split](const std::string& text, bool first) {
    std::string word = replace_all(text, " ", mark);
    bool prepend = scheme == "always" || (scheme == "first" && first);
    if (prepend && !starts_with(word, mark)) word = mark + word;
    if (!split) return std::vector<std::string>{word};
    std::vector<std::string> words;
    for (std::size_t at = 0; at < word.size();) {
      std::size_t next = std::min(word.find(mark, at + 1), word.size());
      words.push_back(word.substr(at, next - at));
      at = next;
    }
    return words;
  });
}

void add_split(const Field& field, std::vector<Splitter>& steps) {
  std::string behavior = field.at("behavior").text();
  if (behavior != "Isolated" && behavior != "Removed")
    field.at("behavior").fail("'" + behavior + "' is not supported");
  bool removed = behavior == "Removed", invert = field.flag_or("invert", false);
  auto regex = std::make_shared<Regex>(pattern_of(field.at("pattern")), field.at("pattern"));
  steps.push_back([=](const std::string& word, bool) {
    return cut(*regex, word, !removed || invert, !removed || !invert);
  });
}

void add_splitter(const Field& field, std::vector<Splitter>& steps) {
  std::string type = field.at("type").text();
  if (type == "Sequence") {
    for (const Field& item : field.at("pretokenizers").items()) add_splitter(item, steps);
  } else if (type == "ByteLevel") {
    add_byte_level(field, steps);
  } else if (type == "Metaspace") {
    add_metaspace(field, steps);
  } else if (type == "Split") {
    add_split(field, steps);
  } else if (type == "Digits") {
    const char* pattern = field.flag_or("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)";
    auto regex = std::make_shared<Regex>(pattern, field);
    steps.push_back(
        [regex](const std::string& word, bool) { return cut(*regex, word, true, true); });
  } else {
    field.at("type").fail("pre-tokenizer '" + type + "' is not supported");
  }
}

/// The printable bytes stand for themselves, the others for characters from U+0100 on.
std::array<char32_t, 256> byte_alphabet() {
  std::array<char32_t, 256> codes{};
  char32_t other = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    bool printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
    codes[byte] = printable ? byte : other++;
  }
  return codes;
}

}  // namespace

Regex::Regex(const std::string& pattern, const Field& field) {
  int error = 0;
  PCRE2_SIZE place = 0;
  auto* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                             PCRE2_UTF | PCRE2_UCP, &error, &place, nullptr);
  if (!code) field.fail("the regular expression is not understood at " + std::to_string(place));
  code_ = {code, [](void* own) { pcre2_code_free(static_cast<pcre2_code*>(own)); }};
}

std::vector<std::pair<std::size_t, std::size_t>> Regex::find(std::string_view text) const {
  auto* code = static_cast<pcre2_code*>(code_.get());
  std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> match(
      pcre2_match_data_create_from_pattern(code, nullptr), pcre2_match_data_free);
  std::vector<std::pair<std::size_t, std::size_t>> found;
  std::size_t at = 0;
  while (at < text.size()) {
    int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                         at == 0 ? 0 : PCRE2_NO_UTF_CHECK, match.get(), nullptr);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0)
      throw Error("the prompt cannot be split into words (PCRE2 " + std::to_string(rc) + ")");
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
    // A pattern with \K may give a match that ends before it begins.
    if (range[0] < range[1] && range[0] >= at) {
      found.emplace_back(range[0], range[1]);
      at = range[1];
    } else {
      at += utf8_head(text.substr(at)).bytes;
    }
  }
  return found;
}

std::vector<Normalizer> read_normalizers(const Field& root) {
  std::vector<Normalizer> steps;
  if (root.has("normalizer")) add_normalizer(root.at("normalizer"), steps);
  return steps;
}

std::vector<Splitter> read_splitters(const Field& root) {
  std::vector<Splitter> steps;
  if (root.has("pre_tokenizer")) add_splitter(root.at("pre_tokenizer"), steps);
  return steps;
}

const std::string& byte_character(std::uint8_t byte) {
  static const auto characters = [] {
    std::array<std::string, 256> texts;
    auto codes = byte_alphabet();
    for (int i = 0; i < 256; ++i) append_utf8(texts[i], codes[i]);
    return texts;
  }();
  return characters[byte];
}

int character_byte(char32_t code) {
  static const auto bytes = [] {
    std::array<int, 0x180> table{};
    table.fill(-1);
    auto codes = byte_alphabet();
    for (int i = 0; i < 256; ++i) table[codes[i]] = i;
    return table;
  }();
  return code < bytes.size() ? bytes[code] : -1;
}

}  // namespace skipvision
