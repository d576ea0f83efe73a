#include <algorithm>
#include <chrono>

#include "manifest.h"
#include "ort_backend.h"
#include "processor.h"
#include "prompt.h"
#include "sampling.h"
#include "skipvision/skipvision.h"
#include "tokenizer.h"

namespace skipvision {
namespace {

class Stopwatch {
 public:
  /// Milliseconds since the last call.
  double lap() {
    auto now = std::chrono::steady_clock::now();
    std::chrono::duration<double, std::milli> passed = now - last_;
    last_ = now;
    return passed.count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  std::size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

Manifest checked(const std::filesystem::path& folder, const BundleOptions& options) {
  if (options.threads < 0)
    throw Error("threads is " + std::to_string(options.threads) + ", expected 0 (chosen) or more");
  Manifest manifest = Manifest::load(folder);
  manifest.verify(folder, options.verify_hashes);
  return manifest;
}

}  // namespace

struct Bundle::Parts {
  Parts(const std::filesystem::path& folder, const BundleOptions& options)
      : manifest(checked(folder, options)),
        tokenizer(Document(folder / "tokenizer.json", "export again")),
        processor(ImageProcessor::load(folder)),
        prompt(manifest, tokenizer),
        ends(end_tokens(folder, tokenizer)),
        positions(max_positions(folder)),
        backend(folder, manifest, options.threads) {}

  ModelInput prepare(const Picture& picture, std::string_view question,
                     const GenerateOptions& options) const;

  Manifest manifest;
  Tokenizer tokenizer;
  ImageProcessor processor;
  PromptBuilder prompt;
  std::vector<std::int64_t> ends;
  std::int64_t positions;
  OrtBackend backend;
};

ModelInput Bundle::Parts::prepare(const Picture& picture, std::string_view question,
                                  const GenerateOptions& options) const {
  if (options.max_new_tokens < 1)
    throw Error("max_new_tokens is " + std::to_string(options.max_new_tokens) +
                ", expected 1 or more");
  ModelInput input;
  input.ids = prompt(question);
  auto length = static_cast<std::int64_t>(input.ids.size());
  if (length >= positions)
    throw Error("the prompt has " + std::to_string(length) +
                " tokens, the model reads fewer than " + std::to_string(positions) +
                "; shorten it");
  if (length + options.max_new_tokens > positions)
    throw Error("the prompt's " + std::to_string(length) + " tokens and " +
                std::to_string(options.max_new_tokens) + " new ones are over the model's " +
                std::to_string(positions) + "; ask for at most " +
                std::to_string(positions - length) + " new tokens, or shorten the prompt");
  input.pixels = processor(picture);
  input.height = processor.height();
  input.width = processor.width();
  return input;
}

Bundle::Bundle(const std::filesystem::path& folder, const BundleOptions& options)
    : parts_(std::make_unique<const Parts>(folder, options)) {}
Bundle::~Bundle() = default;
Bundle::Bundle(Bundle&&) noexcept = default;
Bundle& Bundle::operator=(Bundle&&) noexcept = default;

Answer Bundle::generate(const Picture& picture, std::string_view prompt,
                        const GenerateOptions& options, const TokenCallback& on_text) const {
  Sampler choose(options);
  Answer answer;
  Statistics& statistics = answer.statistics;
  Stopwatch watch;
  ModelInput input = parts_->prepare(picture, prompt, options);
  statistics.prepare_ms = watch.lap();
  std::unique_ptr<Sequence> sequence = parts_->backend.prefill(input);
  statistics.ttft_ms = watch.lap();
  statistics.prompt_tokens = static_cast<int>(input.ids.size());
  statistics.retained_tokens = parts_->manifest.retained;
  statistics.skipped_tokens = parts_->manifest.skipped;
  statistics.kv_tokens_after_prefill = static_cast<int>(sequence->length());

  Detokenizer detokenizer(parts_->tokenizer);
  auto give = [&](const std::string& piece) {
    answer.text += piece;
    return piece.empty() || !on_text || on_text(piece);
  };
  // Decode goes on from the prompt's length, not from the cache's.
  auto position = static_cast<std::int64_t>(input.ids.size());
  const auto& ends = parts_->ends;
  while (true) {
    std::int64_t token = choose(sequence->logits());
    answer.token_ids.push_back(token);
    bool go_on = give(detokenizer.push(token));
    bool full = static_cast<int>(answer.token_ids.size()) == options.max_new_tokens;
    if (!go_on || full || std::find(ends.begin(), ends.end(), token) != ends.end()) break;
    watch.lap();
    sequence->step(token, position++);
    statistics.decode_ms.push_back(watch.lap());
  }
  give(detokenizer.finish());
  statistics.decode_ms_per_token = median(statistics.decode_ms);
  return answer;
}

std::vector<Answer> Bundle::generate(const std::vector<Request>& requests,
                                     const GenerateOptions& options) const {
  std::vector<Answer> answers;
  for (const Request& request : requests)
    answers.push_back(generate(request.picture, request.prompt, options));
  return answers;
}

}  // namespace skipvision
