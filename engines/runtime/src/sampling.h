#pragma once

#include <cstdint>
#include <random>

#include "logits.h"
#include "skipvision/skipvision.h"

namespace skipvision {

/// Chooses tokens: greedily, or from the softmax of logits / temperature, cut by top_k, then top_p.
class Sampler {
 public:
  /// Throws Error for options out of their range.
  explicit Sampler(const GenerateOptions& options);
  /// The index of the chosen logit; of equal ones the first is the likeliest, as numpy's argmax.
  std::int64_t operator()(Logits logits);

 private:
  double temperature_;
  std::size_t top_k_;
  double top_p_;
  std::mt19937_64 random_;
};

}  // namespace skipvision
