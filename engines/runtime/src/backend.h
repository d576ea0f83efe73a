/// What runs a bundle's graphs.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "logits.h"

namespace skipvision {

/// What the graphs take of one prompt.
struct ModelInput {
  std::vector<float> pixels;  // [1, 3, height, width], where tiled [1, crops, 3, height, width]
  std::int64_t crops = 0;     // 0 where pictures are not cut into tiles
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::vector<std::int64_t> ids;  // one placeholder for each visual token of the layout
};

/// Prompts that were prefilled together, one row each, and their cache.
class Sequence {
 public:
  virtual ~Sequence() = default;
  /// Of the row's last position; good until the next step.
  virtual Logits logits(std::size_t row) const = 0;
  /// Cached positions of a row.
  virtual std::int64_t length(std::size_t row) const = 0;
  /// Decodes one token of each row; `positions` count each row's whole original sequence.
  virtual void step(const std::vector<std::int64_t>& tokens,
                    const std::vector<std::int64_t>& positions) = 0;
  /// Milliseconds of the last step that were spent in the graphs.
  virtual double graph_ms() const = 0;
};

/// Threads may share a backend; each sequence belongs to one of them.
class Backend {
 public:
  virtual ~Backend() = default;
  /// Vision encoder, embeddings and prefill of one or more prompts; throws Error.
  virtual std::unique_ptr<Sequence> prefill(const std::vector<ModelInput>& inputs) const = 0;
  /// Prompts that one prefill takes at most.
  virtual std::size_t max_batch() const { return std::numeric_limits<std::size_t>::max(); }
};

}  // namespace skipvision
