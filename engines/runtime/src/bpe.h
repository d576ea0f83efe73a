/// The byte-pair encoding model of a tokenizer.json.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "json.h"

namespace skipvision {

class Bpe {
 public:
  /// `model`: the file's "model"; throws Error that names the field it does not support.
  explicit Bpe(const Field& model);

  /// Appends the ids of one word.
  void encode(const std::string& word, std::vector<std::int64_t>& ids) const;
  /// The id of a token, or -1.
  std::int64_t id(const std::string& token) const;
  const std::unordered_map<std::string, std::int64_t>& vocab() const { return vocab_; }
  bool byte_fallback() const { return byte_fallback_; }

 private:
  struct Merge {
    std::int64_t rank;
    std::int64_t id;
  };

  void read_merge(const Field& merge, std::int64_t rank);
  std::vector<std::int64_t> characters(const std::string& word) const;
  const Merge* merge(std::int64_t left, std::int64_t right) const;

  std::unordered_map<std::string, std::int64_t> vocab_;
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::int64_t unknown_ = -1;
  bool fuse_unknown_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
};

/// The token of a byte in a vocabulary with byte fallback, such as "<0x0A>".
std::string byte_token(std::uint8_t byte);

}  // namespace skipvision
