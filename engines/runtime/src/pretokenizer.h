/// What happens to text before byte-pair encoding: normalizers and pre-tokenizers of a
/// tokenizer.json.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace skipvision {

/// A regular expression of a tokenizer, over UTF-8.
class Regex {
 public:
  /// Throws Error of `field` for one that PCRE2 refuses.
  Regex(const std::string& pattern, const Field& field);
  /// [begin, end) of every match that is not empty; throws Error for text that it cannot be done
  /// on.
  std::vector<std::pair<std::size_t, std::size_t>> find(std::string_view text) const;

 private:
  std::shared_ptr<void> code_;
};

/// Text in, text out.
using Normalizer = std::function<std::string(const std::string&)>;
/// Cuts a word into words; `first` where it stands at the very start of the prompt.
using Splitter = std::function<std::vector<std::string>(const std::string& word, bool first)>;

/// The steps of "normalizer", which may be null; throws Error that names what is not supported.
std::vector<Normalizer> read_normalizers(const Field& root);
/// The steps of "pre_tokenizer", which may be null; the same.
std::vector<Splitter> read_splitters(const Field& root);

/// GPT-2's alphabet: one printable character for each byte, as UTF-8.
const std::string& byte_character(std::uint8_t byte);
/// The byte of one of its characters, or -1.
int character_byte(char32_t code);

}  // namespace skipvision
