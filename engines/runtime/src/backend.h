/// What runs a bundle's graphs.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace skipvision {

/// What the graphs take of one prompt.
struct ModelInput {
  std::vector<float> pixels;  // [1, 3, height, width]
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::vector<std::int64_t> ids;  // one placeholder for each visual token of the layout
};

/// One prompt that has been prefilled, and its cache.
class Sequence {
 public:
  virtual ~Sequence() = default;
  /// [vocab] of the last position.
  virtual const std::vector<float>& logits() const = 0;
  /// Cached positions.
  virtual std::int64_t length() const = 0;
  /// Decodes one token; `position` counts the whole original sequence.
  virtual void step(std::int64_t token, std::int64_t position) = 0;
};

/// Threads may share a backend; each sequence belongs to one of them.
class Backend {
 public:
  virtual ~Backend() = default;
  /// Vision encoder, embeddings and prefill; throws Error.
  virtual std::unique_ptr<Sequence> prefill(const ModelInput& input) const = 0;
};

}  // namespace skipvision
