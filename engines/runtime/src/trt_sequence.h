#pragma once

#include <functional>
#include <memory>

#include "backend.h"
#include "trt_lane.h"

namespace skipvision {

/// A lane, and where it goes back to.
using LaneHold = std::unique_ptr<Lane, std::function<void(Lane*)>>;

/// What decode goes on from.
struct TrtPrefilled {
  LaneHold lane;        // K and V in `present`, on their way
  std::int64_t length;  // of them
  Sizes logits;         // their shape
  Sizes image_features;  // of an embedding without a picture: [0, V, D]
};

/// cuda_graphs: keep room in the cache, so that steps have the same shapes and one graph serves
/// them all. Waits for prefill.
std::unique_ptr<Sequence> make_sequence(TrtPrefilled prefilled, bool cuda_graphs);

}  // namespace skipvision
