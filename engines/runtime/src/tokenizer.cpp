#include "tokenizer.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "skipvision/skipvision.h"
#include "utf8.h"

namespace skipvision {
namespace {

bool is_byte_level(const Field& decoder) {
  return decoder.is_object() && decoder.at("type").text() == "ByteLevel";
}

}  // namespace

Tokenizer::Tokenizer(const Document& document)
    : bpe_(document.root().at("model")),
      normalizers_(read_normalizers(document.root())),
      splitters_(read_splitters(document.root())) {
  Field root = document.root();
  for (const auto& [token, id] : bpe_.vocab()) tokens_[id] = token;
  if (root.has("added_tokens")) read_added(root.at("added_tokens"));
  if (root.has("post_processor")) read_post_processor(root.at("post_processor"));
  read_decoder(root.at("decoder"));
}

void Tokenizer::read_added(const Field& list) {
  for (const Field& item : list.items()) {
    AddedToken token{item.at("id").integer(),        item.at("content").text(),
                     item.flag_or("special", false), item.flag_or("lstrip", false),
                     item.flag_or("rstrip", false),  item.flag_or("normalized", false)};
    if (item.flag_or("single_word", false)) item.at("single_word").fail("is not supported");
    if (token.content.empty()) item.at("content").fail("is empty");
    tokens_[token.id] = token.content;
    if (token.normalized) token.content = normalize(token.content);
    added_.push_back(token);
  }
  // The longest of the tokens that match at one place counts.
  std::stable_sort(added_.begin(), added_.end(), [](const auto& a, const auto& b) {
    return a.content.size() > b.content.size();
  });
}

void Tokenizer::read_post_processor(const Field& processor) {
  std::string type = processor.at("type").text();
  if (type == "Sequence") {
    for (const Field& item : processor.at("processors").items()) read_post_processor(item);
  } else if (type == "TemplateProcessing") {
    bool past_text = false;
    for (const Field& item : processor.at("single").items()) {
      if (item.has("Sequence")) {
        past_text = true;
        continue;
      }
      std::string name = item.at("SpecialToken").at("id").text();
      for (const Field& id : processor.at("special_tokens").at(name).at("ids").items())
        (past_text ? after_ : before_).push_back(id.integer());
    }
  } else if (type != "ByteLevel") {
    processor.at("type").fail("post-processor '" + type + "' is not supported");
  }
}

void Tokenizer::read_decoder(const Field& decoder) {
  if (decoder.is_null()) decoder.fail("is missing; only ByteLevel, Metaspace and Llama's are read");
  std::string type = decoder.at("type").text();
  if (is_byte_level(decoder)) {
    byte_level_ = true;
  } else if (type == "Sequence") {
    for (const Field& item : decoder.at("decoders").items()) read_decoder(item);
  } else if (type == "Metaspace") {
    space_mark_ = decoder.text_or("replacement", "\u2581");
  } else if (type == "Replace") {
    space_mark_ = decoder.at("pattern").at("String").text();
    if (decoder.at("content").text() != " ")
      decoder.at("content").fail("only a space is supported");
  } else if (type == "Strip") {
    // Answers are stripped in any case.
    if (decoder.at("content").text() != " ")
      decoder.at("content").fail("only a space is supported");
  } else if (type != "ByteFallback" && type != "Fuse") {
    decoder.at("type").fail("decoder '" + type + "' is not supported");
  }
}

std::string Tokenizer::normalize(std::string text) const {
  for (const Normalizer& step : normalizers_) text = step(text);
  return text;
}

std::vector<Tokenizer::Piece> Tokenizer::extract(const Piece& piece, bool normalized) const {
  std::vector<Piece> pieces;
  std::string_view text = piece.text;
  std::size_t begin = 0;
  auto put = [&](std::size_t end) {
    if (end > begin)
      pieces.push_back(
          {std::string(text.substr(begin, end - begin)), -1, piece.first && begin == 0});
  };
  for (std::size_t at = 0; at < text.size();) {
    auto token = std::find_if(added_.begin(), added_.end(), [&](const AddedToken& t) {
      return t.normalized == normalized && text.compare(at, t.content.size(), t.content) == 0;
    });
    if (token == added_.end()) {
      ++at;
      continue;
    }
    std::size_t end = at + token->content.size();
    if (token->lstrip)
      while (at > begin && std::isspace(static_cast<unsigned char>(text[at - 1]))) --at;
    if (token->rstrip)
      while (end < text.size() && std::isspace(static_cast<unsigned char>(text[end]))) ++end;
    put(at);
    pieces.push_back({{}, token->id, false});
    begin = at = end;
  }
  put(text.size());
  return pieces;
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text) const {
  if (!is_utf8(text)) throw Error("the prompt is not UTF-8");
  std::vector<std::int64_t> ids = before_;
  auto encode_text = [&](const Piece& piece) {
    std::vector<std::pair<std::string, bool>> words = {{piece.text, piece.first}};
    for (const Splitter& step : splitters_) {
      std::vector<std::pair<std::string, bool>> smaller;
      for (const auto& [word, first] : words) {
        bool own = first;
        for (std::string& part : step(word, first)) {
          smaller.emplace_back(std::move(part), own);
          own = false;
        }
      }
      words = std::move(smaller);
    }
    for (const auto& [word, first] : words) bpe_.encode(word, ids);
  };
  for (Piece& raw : extract({std::string(text), -1, true}, false)) {
    if (raw.id >= 0) {
      ids.push_back(raw.id);
      continue;
    }
    raw.text = normalize(raw.text);
    for (const Piece& piece : extract(raw, true)) {
      if (piece.id >= 0)
        ids.push_back(piece.id);
      else
        encode_text(piece);
    }
  }
  ids.insert(ids.end(), after_.begin(), after_.end());
  return ids;
}

std::int64_t Tokenizer::id(const std::string& token) const {
  for (const AddedToken& added : added_)
    if (tokens_.at(added.id) == token) return added.id;
  return bpe_.id(token);
}

std::string Tokenizer::added_text(std::int64_t id) const {
  for (const AddedToken& added : added_)
    if (added.id == id) return tokens_.at(id);
  return {};
}

std::string Detokenizer::push(std::int64_t id) {
  auto found = tokenizer_.tokens_.find(id);
  if (found == tokenizer_.tokens_.end()) return {};
  for (const AddedToken& added : tokenizer_.added_)
    if (added.id == id && added.special) return {};
  const std::string& token = found->second;
  if (tokenizer_.byte_level_) {
    std::string bytes;
    for (std::string_view rest = token; !rest.empty();) {
      Utf8Head head = utf8_head(rest);
      int byte = head.kind == Utf8Head::kCharacter ? character_byte(head.code) : -1;
      if (byte < 0) {
        bytes = token;
        break;
      }
      bytes += static_cast<char>(byte);
      rest.remove_prefix(head.bytes);
    }
    bytes_ += bytes;
    return emit(false);
  }
  bool is_byte = token.size() == 6 && token.compare(0, 3, "<0x") == 0 && token[5] == '>';
  if (is_byte && tokenizer_.bpe_.byte_fallback()) {
    fallback_ += static_cast<char>(std::strtol(token.substr(3, 2).c_str(), nullptr, 16));
    return {};
  }
  flush_fallback();
  bytes_ += replace_all(token, tokenizer_.space_mark_, " ");
  return emit(false);
}

void Detokenizer::flush_fallback() {
  if (is_utf8(fallback_))
    bytes_ += fallback_;
  else
    for (std::size_t i = 0; i < fallback_.size(); ++i) append_utf8(bytes_, 0xFFFD);
  fallback_.clear();
}

std::string Detokenizer::emit(bool last) {
  std::string piece;
  std::string_view rest = bytes_;
  while (!rest.empty()) {
    Utf8Head head = utf8_head(rest);
    if (head.kind == Utf8Head::kIncomplete && !last) break;
    if (is_space(head.code)) {
      if (started_) append_utf8(spaces_, head.code);
    } else {
      piece += spaces_;
      spaces_.clear();
      started_ = true;
      append_utf8(piece, head.code);
    }
    rest.remove_prefix(head.bytes);
  }
  bytes_ = std::string(rest);
  return piece;
}

std::string Detokenizer::finish() {
  flush_fallback();
  return emit(true);
}

}  // namespace skipvision
