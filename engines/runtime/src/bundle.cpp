#include <algorithm>
#include <numeric>

#include "manifest.h"
#include "ort_backend.h"
#include "processor.h"
#include "prompt.h"
#include "sampling.h"
#include "skipvision/skipvision.h"
#include "stopwatch.h"
#include "tokenizer.h"
#include "trt_backend.h"

namespace skipvision {
namespace {

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

std::unique_ptr<const Backend> make_backend(const std::filesystem::path& folder,
                                            const Manifest& manifest,
                                            const BundleOptions& options) {
  if (!options.engines.empty()) return make_trt_backend(folder, manifest, options);
  if (manifest.dtype == "bfloat16")
    throw Error(
        manifest.name +
        ": dtype: is bfloat16, which ONNX Runtime has no CPU kernels for; export again with "
        "--dtype float32 or float16, or run its engines");
  return std::make_unique<OrtBackend>(folder, manifest, OrtOptions{options.threads});
}

ImageProcessor processor_of(const Manifest& manifest, const std::filesystem::path& folder) {
  ImageProcessor processor = ImageProcessor::load(folder);
  if (processor.tiled() != manifest.tiled)
    throw Error(manifest.name + ": model.tiled is " + (manifest.tiled ? "true" : "false") +
                ", the image processor's configuration says otherwise; export again");
  return processor;
}

struct Question {
  const Picture& picture;
  std::string_view prompt;
};

/// One answer as it comes.
class Writer {
 public:
  Writer(const Tokenizer& tokenizer, const GenerateOptions& options, const TokenCallback& on_text)
      : choose_(options), detokenizer_(tokenizer), on_text_(on_text) {}

  /// Chooses the next token and writes its text; false where the callback wants no more.
  bool next(Logits logits) {
    answer.token_ids.push_back(choose_(logits));
    return give(detokenizer_.push(answer.token_ids.back()));
  }
  void finish() {
    give(detokenizer_.finish());
    answer.statistics.decode_ms_per_token = median(answer.statistics.decode_ms);
  }

  Answer answer;
  bool ended = false;

 private:
  bool give(const std::string& piece) {
    answer.text += piece;
    return piece.empty() || !on_text_ || on_text_(piece);
  }

  Sampler choose_;
  Detokenizer detokenizer_;
  const TokenCallback& on_text_;
};

}  // namespace

struct Bundle::Parts {
  Parts(const std::filesystem::path& folder, const BundleOptions& options)
      : manifest(checked(folder, options)),
        tokenizer(Document(folder / "tokenizer.json", "export again")),
        processor(processor_of(manifest, folder)),
        prompt(manifest, tokenizer),
        ends(end_tokens(folder, tokenizer)),
        backend(make_backend(folder, manifest, options)) {}

  ModelInput prepare(const Picture& picture, std::string_view question,
                     const GenerateOptions& options) const;
  /// All prompts in one run.
  std::vector<Answer> answer(const std::vector<Question>& questions, const GenerateOptions& options,
                             const TokenCallback& on_text) const;

  Manifest manifest;
  Tokenizer tokenizer;
  ImageProcessor processor;
  PromptBuilder prompt;
  std::vector<std::int64_t> ends;
  std::unique_ptr<const Backend> backend;
};

ModelInput Bundle::Parts::prepare(const Picture& picture, std::string_view question,
                                  const GenerateOptions& options) const {
  if (options.max_new_tokens < 1)
    throw Error("max_new_tokens is " + std::to_string(options.max_new_tokens) +
                ", expected 1 or more");
  ModelInput input;
  input.ids = prompt(question);
  auto length = static_cast<std::int64_t>(input.ids.size());
  std::int64_t positions = manifest.max_positions;
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
  if (processor.tiled())
    input.crops = static_cast<std::int64_t>(input.pixels.size()) / (3 * input.height * input.width);
  return input;
}

Bundle::Bundle(const std::filesystem::path& folder, const BundleOptions& options)
    : parts_(std::make_unique<const Parts>(folder, options)) {}
Bundle::~Bundle() = default;
Bundle::Bundle(Bundle&&) noexcept = default;
Bundle& Bundle::operator=(Bundle&&) noexcept = default;

std::vector<Answer> Bundle::Parts::answer(const std::vector<Question>& questions,
                                          const GenerateOptions& options,
                                          const TokenCallback& on_text) const {
  std::vector<Writer> writers;
  std::vector<ModelInput> inputs;
  Stopwatch watch;
  for (const Question& question : questions) {
    Statistics& statistics = writers.emplace_back(tokenizer, options, on_text).answer.statistics;
    inputs.push_back(prepare(question.picture, question.prompt, options));
    statistics.prepare_ms = watch.lap();
  }
  std::unique_ptr<Sequence> sequence = backend->prefill(inputs);
  double first_ms = watch.lap();
  // Decode goes on from each prompt's length, not from the cache's.
  std::vector<std::int64_t> tokens(inputs.size()), positions;
  for (std::size_t row = 0; row < inputs.size(); ++row) {
    positions.push_back(static_cast<std::int64_t>(inputs[row].ids.size()));
    Statistics& statistics = writers[row].answer.statistics;
    statistics.ttft_ms = first_ms;
    statistics.prompt_tokens = static_cast<int>(positions[row]);
    statistics.retained_tokens = manifest.retained;
    statistics.skipped_tokens = manifest.skipped;
    statistics.kv_tokens_after_prefill = static_cast<int>(sequence->length(row));
  }
  watch.lap();
  std::vector<std::size_t> rows(writers.size());  // of the sequence: whose they are
  std::iota(rows.begin(), rows.end(), 0);
  while (true) {
    std::vector<std::size_t> running;  // rows
    for (std::size_t row = 0; row < rows.size(); ++row) {
      Writer& writer = writers[rows[row]];
      if (writer.ended) continue;  // it feeds its last token on
      bool go_on = writer.next(sequence->logits(row));
      tokens[row] = writer.answer.token_ids.back();
      bool full = static_cast<int>(writer.answer.token_ids.size()) == options.max_new_tokens;
      writer.ended =
          !go_on || full || std::find(ends.begin(), ends.end(), tokens[row]) != ends.end();
      if (writer.ended) writer.finish();
      if (!writer.ended) running.push_back(row);
    }
    if (running.empty()) break;
    if (running.size() < rows.size() && sequence->keep(running)) {
      for (std::size_t row = 0; row < running.size(); ++row) {
        rows[row] = rows[running[row]];
        tokens[row] = tokens[running[row]];
        positions[row] = positions[running[row]];
      }
      for (auto* list : {&tokens, &positions}) list->resize(running.size());
      rows.resize(running.size());
    }
    double between_ms = watch.lap();
    sequence->step(tokens, positions);
    double step_ms = watch.lap();
    for (std::size_t row = 0; row < rows.size(); ++row) {
      ++positions[row];
      Writer& writer = writers[rows[row]];
      if (writer.ended) continue;
      Statistics& statistics = writer.answer.statistics;
      statistics.decode_ms.push_back(step_ms);
      statistics.outside_ms.push_back(between_ms + step_ms - sequence->graph_ms());
    }
  }
  std::vector<Answer> answers;
  for (Writer& writer : writers) answers.push_back(std::move(writer.answer));
  return answers;
}

Answer Bundle::generate(const Picture& picture, std::string_view prompt,
                        const GenerateOptions& options, const TokenCallback& on_text) const {
  return std::move(parts_->answer({{picture, prompt}}, options, on_text).front());
}

std::vector<Answer> Bundle::generate(const std::vector<Request>& requests,
                                     const GenerateOptions& options) const {
  if (options.max_batch < 1)
    throw Error("max_batch is " + std::to_string(options.max_batch) + ", expected 1 or more");
  std::size_t most =
      std::min(static_cast<std::size_t>(options.max_batch), parts_->backend->max_batch());
  std::vector<Answer> answers;
  for (std::size_t first = 0; first < requests.size(); first += most) {
    std::vector<Question> questions;
    for (std::size_t i = first; i < std::min(first + most, requests.size()); ++i)
      questions.push_back({requests[i].picture, requests[i].prompt});
    for (Answer& answer : parts_->answer(questions, options, {}))
      answers.push_back(std::move(answer));
  }
  return answers;
}

}  // namespace skipvision
