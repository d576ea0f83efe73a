/// Text from a picture and a prompt, out of a bundle that `skipvision export` wrote; no Python.
///
///   skipvision::Bundle bundle("bundle");
///   auto picture = skipvision::Picture::open("photo.png");
///   std::cout << bundle.generate(picture, "What is this?").text << "\n";
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace skipvision {

/// The only exception that the library throws on purpose: one line that says what is wrong, what
/// was expected and what to do; where a file of the bundle is at fault, its name and the field.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A decoded picture: `rgb` is height x width x 3, 8 bits each, rows from the top.
struct Picture {
  int width = 0;
  int height = 0;
  std::vector<std::uint8_t> rgb;

  /// A PNG or JPEG file; throws Error for one that is missing, truncated or neither.
  static Picture open(const std::filesystem::path& file);
  /// The bytes of such a file; `name` stands in errors.
  static Picture decode(const void* data, std::size_t bytes, const std::string& name = "picture");
};

struct BundleOptions {
  /// Compare every file's sha256 with the manifest's, which reads every byte; sizes always are.
  bool verify_hashes = true;
  /// Threads within one operator; 0 lets ONNX Runtime choose.
  int threads = 0;
  /// A folder that `skipvision build` wrote of this bundle: its engines run in TensorRT, on the
  /// calling thread's CUDA device. Empty: the bundle runs in ONNX Runtime.
  std::filesystem::path engines = {};
  /// The KVPrune library, where the engines need it; empty: the one beside them.
  std::filesystem::path plugin = {};
  /// Decode in TensorRT as a CUDA graph where it can be captured.
  bool cuda_graphs = true;
};

struct GenerateOptions {
  /// Where an answer is cut; prompt and answer together must fit the model's positions.
  int max_new_tokens = 64;
  /// 0 takes the likeliest token (greedy); otherwise logits are divided by it and sampled.
  double temperature = 0;
  /// Sample among the `top_k` likeliest tokens only; 0 for all of them.
  int top_k = 0;
  /// Then among the likeliest whose probabilities reach `top_p`, (0, 1].
  double top_p = 1;
  /// The same seed, prompt and options give the same answer on the same machine.
  std::uint64_t seed = 0;
  /// Requests that run together where several are given; more of them wait for their turn.
  int max_batch = 8;
};

/// What one generation did; times in milliseconds, in a batch those of all of it.
struct Statistics {
  int prompt_tokens = 0;
  int retained_tokens = 0;
  int skipped_tokens = 0;
  int kv_tokens_after_prefill = 0;
  /// Resizing the picture and tokenizing the prompt.
  double prepare_ms = 0;
  /// Vision encoder, embeddings and prefill.
  double ttft_ms = 0;
  /// Of each decode step, and their median (0 where there was none).
  std::vector<double> decode_ms;
  double decode_ms_per_token = 0;
  /// For each decode step, what the loop spent outside of the graphs: choosing the token before it,
  /// the text and its callback, handing tensors over.
  std::vector<double> outside_ms;
};

struct Answer {
  std::string text;
  /// The end token included, where there is one.
  std::vector<std::int64_t> token_ids;
  Statistics statistics;
};

struct Request {
  Picture picture;
  std::string prompt;
};

/// Called with each piece of the answer as it comes: whole UTF-8 characters, which joined are the
/// text. Return false to stop after the token.
using TokenCallback = std::function<bool(std::string_view piece)>;

/// A loaded bundle. Threads may share one: `generate` changes nothing in it.
class Bundle {
 public:
  /// Reads and checks a bundle and creates its sessions; throws Error.
  explicit Bundle(const std::filesystem::path& folder, const BundleOptions& options = {});
  ~Bundle();
  Bundle(Bundle&&) noexcept;
  Bundle& operator=(Bundle&&) noexcept;

  /// Answers `prompt`, a question, or a whole prompt with the model's picture placeholder in it.
  /// Throws Error for a picture, prompt or option that cannot be used.
  Answer generate(const Picture& picture, std::string_view prompt,
                  const GenerateOptions& options = {}, const TokenCallback& on_text = {}) const;

  /// Answers requests together, `max_batch` at a time: one prefill, and one decode step for the
  /// next token of all. Each answer has the ids that it has alone, but for ties within rounding.
  std::vector<Answer> generate(const std::vector<Request>& requests,
                               const GenerateOptions& options = {}) const;

 private:
  struct Parts;
  std::unique_ptr<const Parts> parts_;
};

}  // namespace skipvision
