#include "prompt.h"

#include "skipvision/skipvision.h"
#include "utf8.h"

namespace skipvision {
namespace {

int count(std::string_view text, std::string_view part) {
  int found = 0;
  for (auto at = text.find(part); at != std::string_view::npos;
       at = text.find(part, at + part.size()))
    ++found;
  return found;
}

bool is_file(const std::filesystem::path& file) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(file, ignored);
}

}  // namespace

PromptBuilder::PromptBuilder(const Manifest& manifest, const Tokenizer& tokenizer)
    : manifest_(manifest),
      tokenizer_(tokenizer),
      placeholder_(tokenizer.added_text(manifest.image_token_id)) {
  if (placeholder_.empty())
    throw Error(manifest.name + ": model.image_token_id: is no added token of tokenizer.json");
}

std::vector<std::int64_t> PromptBuilder::operator()(std::string_view question) const {
  if (!is_utf8(question)) throw Error("the prompt is not UTF-8");
  if (strip(question).empty()) throw Error("the prompt is empty; ask something about the picture");
  std::string text(question);
  if (count(text, placeholder_) == 0 && manifest_.prompt) {
    const ChatPrompt& chat = *manifest_.prompt;
    text = chat.before + std::string(chat.strips ? strip(question) : question) + chat.after;
  }
  if (int places = count(text, placeholder_); places != 1)
    throw Error("the prompt has " + std::to_string(places) + " " + placeholder_ +
                " placeholders, expected exactly one for the one picture");
  std::vector<std::int64_t> ids;
  for (std::int64_t id : tokenizer_.encode(text)) {
    bool picture = id == manifest_.image_token_id;
    ids.insert(ids.end(), picture ? manifest_.layout.total() : 1, id);
  }
  return ids;
}

std::vector<std::int64_t> end_tokens(const std::filesystem::path& folder,
                                     const Tokenizer& tokenizer) {
  for (const char* name : {"generation_config.json", "config.json"}) {
    if (!is_file(folder / name)) continue;
    Document document(folder / name, "export again");
    Field root = document.root();
    bool own = root.has("eos_token_id");
    if (!own && !(root.has("text_config") && root.at("text_config").has("eos_token_id"))) continue;
    Field eos = own ? root.at("eos_token_id") : root.at("text_config").at("eos_token_id");
    std::vector<std::int64_t> ids;
    if (!eos.is_array()) return {eos.integer()};
    for (const Field& id : eos.items()) ids.push_back(id.integer());
    return ids;
  }
  if (!is_file(folder / "tokenizer_config.json")) return {};
  Document document(folder / "tokenizer_config.json", "export again");
  if (!document.root().has("eos_token")) return {};
  Field eos = document.root().at("eos_token");
  std::int64_t id = tokenizer.id(eos.is_string() ? eos.text() : eos.at("content").text());
  if (id < 0) eos.fail("is no token of tokenizer.json");
  return {id};
}

}  // namespace skipvision
