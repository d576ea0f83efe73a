#include "bpe.h"

#include <cstdio>
#include <queue>
#include <tuple>

#include "utf8.h"

namespace skipvision {
namespace {

std::uint64_t key(std::int64_t left, std::int64_t right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
}

}  // namespace

std::string byte_token(std::uint8_t byte) {
  char text[8];
  std::snprintf(text, sizeof text, "<0x%02X>", byte);
  return text;
}

Bpe::Bpe(const Field& model) {
  if (model.text_or("type", "BPE") != "BPE")
    model.at("type").fail("'" + model.at("type").text() + "' is not supported, only BPE is");
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!model.text_or(name, "").empty()) model.at(name).fail("is not supported");
  if (model.has("dropout") && model.at("dropout").number() != 0)
    model.at("dropout").fail("is not supported");
  for (const auto& [token, id] : model.at("vocab").members()) vocab_[token] = id.integer();
  fuse_unknown_ = model.flag_or("fuse_unk", false);
  byte_fallback_ = model.flag_or("byte_fallback", false);
  ignore_merges_ = model.flag_or("ignore_merges", false);
  if (model.has("unk_token")) {
    unknown_ = id(model.at("unk_token").text());
    if (unknown_ < 0) model.at("unk_token").fail("is not in the vocabulary");
  }
  std::int64_t rank = 0;
  for (const Field& merge : model.at("merges").items()) read_merge(merge, rank++);
}

void Bpe::read_merge(const Field& merge, std::int64_t rank) {
  std::string left, right;
  if (merge.is_string()) {
    std::string pair = merge.text();
    auto space = pair.find(' ');
    if (space == std::string::npos) merge.fail("expected two tokens");
    left = pair.substr(0, space);
    right = pair.substr(space + 1);
  } else {
    auto pair = merge.items();
    if (pair.size() != 2) merge.fail("expected two tokens");
    left = pair[0].text();
    right = pair[1].text();
  }
  std::int64_t a = id(left), b = id(right), joined = id(left + right);
  if (a < 0 || b < 0 || joined < 0) merge.fail("holds a token that is not in the vocabulary");
  merges_[key(a, b)] = {rank, joined};
}

std::int64_t Bpe::id(const std::string& token) const {
  auto found = vocab_.find(token);
  return found == vocab_.end() ? -1 : found->second;
}

const Bpe::Merge* Bpe::merge(std::int64_t left, std::int64_t right) const {
  auto found = merges_.find(key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

std::vector<std::int64_t> Bpe::characters(const std::string& word) const {
  std::vector<std::int64_t> ids;
  bool after_unknown = false;
  for (std::size_t at = 0; at < word.size();) {
    std::size_t size = utf8_head(std::string_view(word).substr(at)).bytes;
    std::string character = word.substr(at, size);
    at += size;
    bool was_unknown = after_unknown;
    after_unknown = false;
    if (std::int64_t whole = id(character); whole >= 0) {
      ids.push_back(whole);
      continue;
    }
    std::vector<std::int64_t> bytes;
    if (byte_fallback_)
      for (char byte : character) {
        std::int64_t own = id(byte_token(static_cast<std::uint8_t>(byte)));
        if (own >= 0) bytes.push_back(own);
      }
    if (bytes.size() == size) {
      ids.insert(ids.end(), bytes.begin(), bytes.end());
    } else if (unknown_ >= 0) {
      if (!(fuse_unknown_ && was_unknown)) ids.push_back(unknown_);
      after_unknown = true;
    }
  }
  return ids;
}

void Bpe::encode(const std::string& word, std::vector<std::int64_t>& ids) const {
  if (ignore_merges_) {
    if (std::int64_t whole = id(word); whole >= 0) return ids.push_back(whole);
  }
  std::vector<std::int64_t> symbols = characters(word);
  // A doubly linked list of symbols, and a queue of the merges that its neighbours allow: n log n
  // in the length of a word, which is the whole text where nothing splits it.
  auto count = static_cast<int>(symbols.size());
  std::vector<int> next(count), previous(count);
  using Candidate = std::tuple<std::int64_t, int, std::int64_t>;  // rank, left place, merged id
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  auto offer = [&](int left) {
    if (left < 0 || next[left] == count) return;
    if (const Merge* found = merge(symbols[left], symbols[next[left]]))
      queue.emplace(found->rank, left, found->id);
  };
  for (int i = 0; i < count; ++i) {
    next[i] = i + 1;
    previous[i] = i - 1;
  }
  for (int i = 0; i < count; ++i) offer(i);
  while (!queue.empty()) {
    auto [rank, left, id] = queue.top();
    queue.pop();
    if (symbols[left] < 0 || next[left] == count) continue;
    int right = next[left];
    const Merge* still = merge(symbols[left], symbols[right]);
    if (!still || still->id != id) continue;
    symbols[left] = id;
    symbols[right] = -1;
    next[left] = next[right];
    if (next[left] != count) previous[next[left]] = left;
    offer(previous[left]);
    offer(left);
  }
  for (std::int64_t symbol : symbols)
    if (symbol >= 0) ids.push_back(symbol);
}

}  // namespace skipvision
