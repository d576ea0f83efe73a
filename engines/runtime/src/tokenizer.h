/// tokenizer.json: text to ids and back, as Hugging Face's tokenizers does it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bpe.h"
#include "json.h"
#include "pretokenizer.h"

namespace skipvision {

/// A token with a meaning of its own, found in text before anything else.
struct AddedToken {
  std::int64_t id = 0;
  std::string content;
  bool special = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = false;
};

class Tokenizer {
 public:
  /// Throws Error that names the file and the field that it does not support.
  explicit Tokenizer(const Document& document);

  /// Ids of a text, with what the post-processor adds, such as a begin token; throws Error for text
  /// that is not UTF-8.
  std::vector<std::int64_t> encode(std::string_view text) const;
  /// The id of a token, or -1.
  std::int64_t id(const std::string& token) const;
  /// The text of an added token; empty for any other.
  std::string added_text(std::int64_t id) const;

 private:
  friend class Detokenizer;
  struct Piece {
    std::string text;      // where id < 0
    std::int64_t id = -1;  // of an added token
    bool first = false;    // at the very start of the prompt
  };

  void read_added(const Field& root);
  void read_decoder(const Field& decoder);
  void read_post_processor(const Field& processor);
  std::vector<Piece> extract(const Piece& piece, bool normalized) const;
  std::string normalize(std::string text) const;

  Bpe bpe_;
  std::vector<Normalizer> normalizers_;
  std::vector<Splitter> splitters_;
  std::vector<AddedToken> added_;
  std::vector<std::int64_t> before_, after_;
  bool byte_level_ = false;
  std::string space_mark_;  // that the decoder makes a space of
  std::unordered_map<std::int64_t, std::string> tokens_;
};

/// The text of ids as they come, special tokens left out, stripped as by Python's str.strip():
/// the pieces, which end with whole characters, join to the text.
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  /// The text that this id completes; may be empty.
  std::string push(std::int64_t id);
  /// What was held back: the rest of a character that will not be completed, as U+FFFD.
  std::string finish();

 private:
  std::string emit(bool last);
  void flush_fallback();

  const Tokenizer& tokenizer_;
  std::string bytes_;     // not given out yet; may end within a character
  std::string fallback_;  // a run of <0xNN> tokens
  std::string spaces_;    // held back, for they may be the last
  bool started_ = false;
};

}  // namespace skipvision
