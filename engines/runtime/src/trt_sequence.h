#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "backend.h"
#include "trt_lane.h"

namespace skipvision {

/// A lane, and where it goes back to.
using LaneHold = std::unique_ptr<Lane, std::function<void(Lane*)>>;

/// What decode goes on from: K and V in the lane's `present`, logits in its `prompt_logits`, both
/// on their way.
struct TrtPrefilled {
  LaneHold lane;
  std::int64_t kept = 0;              // positions of K and V
  std::vector<std::int64_t> padding;  // of each row, in front
  Sizes logits, image_features;       // shapes; the latter of an embedding without a picture
};

/// cuda_graphs: keep room in the cache, so that steps have the same shapes and one graph serves
/// them all. Waits for prefill.
std::unique_ptr<Sequence> make_sequence(TrtPrefilled prefilled, bool cuda_graphs);

}  // namespace skipvision
