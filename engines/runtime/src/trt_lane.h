/// What one sequence has of its own on the device.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "logits.h"
#include "trt_cuda.h"
#include "trt_engine.h"

namespace skipvision {

/// The four engines of a bundle.
struct TrtEngines {
  TrtEngines(const TrtRuntime& runtime, const EnginesManifest& manifest);

  /// Bytes of scratch memory that serve any of them in any profile.
  std::int64_t scratch_bytes() const;

  TrtEngine vision, embed, prefill, decode;
};

/// Inputs from the host: written to pinned memory, sent in one copy.
class Upload {
 public:
  /// Sets the inputs' sizes, and room for each in both memories; returns the inputs.
  std::vector<TrtInput> lay_out(const std::vector<std::pair<TensorInfo, Sizes>>& inputs);
  /// Copies what was written to `host` of each since.
  void send(cudaStream_t stream) const;

 private:
  cuda::Buffer host_{cuda::Buffer::Place::kHost}, device_;
  std::size_t bytes_ = 0;
};

/// The scores of each row's last position, from the device.
class Download {
 public:
  /// Copies them from logits [rows, S, vocab].
  void fetch(const cuda::Buffer& logits, const Sizes& sizes, const std::string& dtype,
             cudaStream_t stream);
  /// Once the stream has been waited for; `values` is room for those that are no floats.
  Logits read(std::size_t row, std::vector<float>& values) const;

 private:
  cuda::Buffer host_{cuda::Buffer::Place::kHost};
  std::size_t vocabulary_ = 0;
  std::string dtype_;
};

/// K or V of a layer.
struct CacheNames {
  std::string past, present;
};

/// A stream, the execution contexts, and the memory of one sequence at a time; the next one takes
/// all of it over, a graph that still fits included.
///
/// Decode joins the past and the new token's K/V into its outputs, so each of them has two buffers:
/// it reads `past` and writes `present`.
struct Lane {
  explicit Lane(const TrtEngines& engines);

  cuda::Buffer scratch;
  Execution vision, embed, prefill;
  // Of decode. The embeddings have a second context for it: a graph holds for one shape.
  Execution embed_token, decode;
  Upload prompt, token;
  Download scores;
  cuda::Buffer picture, features, prompt_embeds, prompt_logits, token_embeds, logits;
  std::vector<CacheNames> cache;
  std::vector<cuda::Buffer> past, present;

  // What decode's contexts are set to: rows, the past's positions, and places.
  std::vector<const void*> bound;
  std::vector<TrtInput> token_inputs;  // ids, no picture, positions, mask
  cuda::Graph graph;
  int runs = 0;  // since they were set
  bool can_capture = true;
  bool healthy = true;
  cuda::Stream stream;  // last: it waits for its work, then the memory may go
};

}  // namespace skipvision
