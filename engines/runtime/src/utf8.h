/// UTF-8 as Python's str sees it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace skipvision {

/// What stands at the start of `text`: a character, bytes that are none, or the start of a
/// character that may still be completed.
struct Utf8Head {
  enum Kind { kCharacter, kInvalid, kIncomplete } kind = kInvalid;
  std::size_t bytes = 1;
  char32_t code = 0xFFFD;
};

/// The head of a text that is not empty. Invalid bytes are counted as Unicode's "maximal subpart",
/// so that each such head is one U+FFFD, as in Python and Rust.
Utf8Head utf8_head(std::string_view text);

bool is_utf8(std::string_view text);
void append_utf8(std::string& text, char32_t code);
/// Whether Python's str.strip() takes the character off.
bool is_space(char32_t code);
/// As Python's str.strip(); `text` is valid UTF-8.
std::string_view strip(std::string_view text);
/// `text` with every `from` replaced.
std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

}  // namespace skipvision
