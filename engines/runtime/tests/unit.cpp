/// What needs no Python beside it: UTF-8, streaming, sampling, resizing, layouts, the manifest.
#include <algorithm>
#include <cmath>
#include <functional>
#include <iostream>
#include <limits>

#include "batch.h"
#include "layout.h"
#include "manifest.h"
#include "resize.h"
#include "sampling.h"
#include "tokenizer.h"
#include "utf8.h"
#include "weights.h"

namespace {

using namespace skipvision;

int failures = 0;

void check(bool holds, const std::string& what) {
  if (holds) return;
  std::cerr << "FAILED: " << what << "\n";
  ++failures;
}

void check_error(const std::string& part, const std::function<void()>& call) {
  try {
    call();
    check(false, "no error with " + part);
  } catch (const Error& error) {
    check(std::string(error.what()).find(part) != std::string::npos,
          std::string(error.what()) + " has no " + part);
  }
}

// A byte-level vocabulary of the 256 bytes, one merge and a special token.
std::string byte_tokenizer() {
  nlohmann::json vocab;
  for (int byte = 0; byte < 256; ++byte)
    vocab[byte_character(static_cast<std::uint8_t>(byte))] = byte;
  vocab["ab"] = 256;
  nlohmann::json file = {
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b"}}}},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
      {"decoder", {{"type", "ByteLevel"}}},
      {"added_tokens", {{{"id", 257}, {"content", "<end>"}, {"special", true}}}}};
  return file.dump();
}

void test_utf8() {
  check(is_utf8("a\u00e9\u65e5\U0001F600"), "whole characters");
  for (const char* text :
       {"\x80", "\xC0\xAF", "\xE0\x80\x80", "\xED\xA0\x80", "\xF5\x80\x80\x80", "\xE6\x97"})
    check(!is_utf8(text), "broken UTF-8 taken");
  check(strip(" \n\u00a0a b\u3000 ") == "a b", "strip");
  check(strip(" \t ").empty(), "strip of spaces");
}

void test_streaming() {
  Tokenizer tokenizer(Document(byte_tokenizer(), "tokenizer.json", "again"));
  std::string text = "  \u65e5\U0001F600 ab\xE6\x97!  ", pieces, all;
  Detokenizer detokenizer(tokenizer);
  for (char byte : text) {
    std::string piece = detokenizer.push(static_cast<std::uint8_t>(byte));
    check(is_utf8(piece), "a piece ends within a character");
    all += piece;
  }
  all += detokenizer.push(257);
  all += detokenizer.finish();
  check(all == "\u65e5\U0001F600 ab\uFFFD!", "streamed text is " + all);
  check(tokenizer.encode("ab<end>b") == std::vector<std::int64_t>{256, 257, 'b'}, "encode");
  check_error("not UTF-8", [&] { tokenizer.encode("\xFF"); });
}

void test_tokenizer_refuses() {
  auto with = [](const char* place, const nlohmann::json& value) {
    auto file = nlohmann::json::parse(byte_tokenizer());
    file[nlohmann::json::json_pointer(place)] = value;
    return [text = file.dump()] { Tokenizer(Document(text, "tokenizer.json", "again")); };
  };
  check_error("tokenizer.json: model.type", with("/model/type", "Unigram"));
  check_error("model.merges.0", with("/model/merges/0", "a q"));
  check_error("model.dropout", with("/model/dropout", 0.1));
  check_error("pre_tokenizer.type", with("/pre_tokenizer/type", "BertPreTokenizer"));
  check_error("normalizer.type", with("/normalizer", {{"type", "Lowercase"}}));
  check_error("decoder.type", with("/decoder/type", "WordPiece"));
  check_error("post_processor.type", with("/post_processor", {{"type", "BertProcessing"}}));
  check_error("added_tokens.0.single_word", with("/added_tokens/0/single_word", true));
  check_error("no JSON", [] { Document("{", "x.json", "again"); });
}

void test_sampling() {
  std::vector<float> logits = {0, 3, 1, 3, -1};
  GenerateOptions options;
  check(Sampler(options)(logits) == 1, "greedy takes the first of the likeliest");
  options.temperature = 0.7;
  options.seed = 7;
  auto draw = [&](const GenerateOptions& own, int n) {
    Sampler sampler(own);
    std::vector<std::int64_t> all;
    for (int i = 0; i < n; ++i) all.push_back(sampler(logits));
    return all;
  };
  check(draw(options, 50) == draw(options, 50), "a seed is reproducible");
  auto other = options;
  other.seed = 8;
  check(draw(options, 50) != draw(other, 50), "another seed is another answer");
  options.top_k = 2;
  for (auto id : draw(options, 200)) check(id == 1 || id == 3, "top_k");
  options.top_k = 0;
  options.top_p = 0.5;
  for (auto id : draw(options, 200)) check(id == 1 || id == 3, "top_p");
  options.top_p = 1;
  // Frequencies of 20,000 draws are within five standard deviations of the softmax.
  auto all = draw(options, 20000);
  double sum = 0;
  for (float logit : logits) sum += std::exp(logit / 0.7);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    double p = std::exp(logits[i] / 0.7) / sum;
    auto found = static_cast<double>(std::count(all.begin(), all.end(), i)) / 20000;
    check(std::abs(found - p) < 5 * std::sqrt(p / 20000) + 1e-4, "frequency of a token");
  }
  options.temperature = std::numeric_limits<double>::quiet_NaN();
  check_error("temperature", [&] { Sampler sampler(options); });
  check_error("top_p", [] { Sampler({64, 1, 0, 0, 0}); });
  check_error("top_k", [] { Sampler({64, 1, -1, 1, 0}); });
}

void test_resize() {
  Picture flat{7, 5, std::vector<std::uint8_t>(105, 77)};
  for (int width : {1, 3, 7, 20})
    for (int height : {1, 5, 9}) {
      Picture result = resize_bicubic(flat, width, height);
      check(result.rgb == std::vector<std::uint8_t>(std::size_t{3} * width * height, 77),
            "a flat picture stays flat");
    }
}

void test_layout() {
  Layout layout;
  for (auto [role, count] :
       {std::pair{"retained", 2}, {"summary", 1}, {"skipped", 2}, {"kv_only", 1}}) {
    Run run;
    check(set_role(run, role), "role");
    run.count = count;
    layout.runs.push_back(run);
  }
  std::vector<std::int64_t> ids = {5, 9, 9, 9, 9, 9, 9, 6};
  PrefillIndices indices = prefill_indices(ids, 9, layout);
  check(indices.ffn_rows == std::vector<std::vector<std::int64_t>>{{0, 1, 2, 3, 7}}, "ffn_index");
  check(indices.kv_keep == std::vector<std::int64_t>{0, 1, 2, 3, 6, 7}, "kv_keep_index");
  check(indices.image_index == std::vector<std::int64_t>{0, 1, 1, 1, -1, -1, 1, 0}, "image_index");
  layout.tiers = {0, 0, 1, 2};
  layout.layer_tiers = {2, 0, 1};
  check(layout.used_tiers() == std::vector<int>{1, 2}, "tiers");
  check(
      prefill_indices(ids, 9, layout).ffn_rows[1] == std::vector<std::int64_t>{0, 1, 2, 3, 4, 5, 7},
      "ffn_index.2");
}

void test_batch() {
  Layout layout;
  for (auto [role, count] : {std::pair{"retained", 1}, {"skipped", 2}}) {
    layout.runs.emplace_back();
    set_role(layout.runs.back(), role);
    layout.runs.back().count = count;
  }
  using Ints = std::vector<std::int64_t>;
  PromptBatch batch =
      batch_prompts({{{}, 0, 0, 0, {9, 9, 9, 5}}, {{}, 0, 0, 0, {7, 8, 9, 9, 9, 6}}}, 9, layout);
  check(batch.rows == 2 && batch.length == 6 && batch.kept == 4, "sizes of a batch");
  check(batch.padding == Ints{2, 0}, "padding");
  check(batch.ids == Ints{0, 0, 9, 9, 9, 5, 7, 8, 9, 9, 9, 6}, "padded ids");
  check(batch.mask == Ints{0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, "attention_mask");
  check(batch.positions == Ints{0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5}, "position_ids");
  check(batch.ffn_rows == std::vector<Ints>{{2, 5, 6, 7, 8, 11}}, "ffn_index of a batch");
  check(batch.kv_keep == Ints{0, 1, 2, 5, 0, 1, 2, 5}, "kv_keep_index of a batch");
  check(batch.image_index == Ints{0, 0, 1, -1, -1, 0, 0, 0, 1, -1, -1, 0}, "image_index");
  check(batch_prompts({{{}, 0, 0, 0, {0, 5}}, {{}, 0, 0, 0, {0}}}, 0, layout).ids[2] == 1,
        "filler");
  check_error("numbers of pictures", [&] {
    batch_prompts({{{}, 0, 0, 0, {9, 9, 9}}, {{}, 0, 0, 0, {7}}}, 9, layout);
  });
}

void test_manifest_errors() {
  auto read = [](const std::string& text) {
    return [text] { Manifest::parse(Document(text, "skipvision.json", "again")); };
  };
  check_error("skipvision.json: schema_version: is missing", read("{}"));
  check_error("schema_version: is 2", read(R"({"schema_version": 2})"));
  check_error("skipvision.json: model.num_layers", read(R"({"schema_version": 1, "model": {}})"));
  check_error("model.merge_size: is set: the model takes pictures of any shape",
              read(R"({"schema_version": 1, "model": {"merge_size": 2}})"));
  check_error("no ONNX graph", [] { external_tensors("\x3A\xFF", "x.onnx"); });
}

}  // namespace

int main() {
  for (auto test : {test_utf8, test_streaming, test_tokenizer_refuses, test_sampling, test_resize,
                    test_layout, test_batch, test_manifest_errors})
    test();
  if (failures == 0) std::cout << "all unit tests passed\n";
  return failures == 0 ? 0 : 1;
}
