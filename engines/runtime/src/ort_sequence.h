#pragma once

#include <memory>
#include <vector>

#include "backend.h"
#include "ort_graph.h"

namespace skipvision {

/// What decode goes on from.
struct Prefilled {
  std::vector<Ort::Value> outputs;  // as `names`: logits, and K and V of each layer
  const std::vector<TensorInfo>* names = nullptr;
  Shape image_features;               // of an embedding without a picture: [0, V, D]
  std::vector<std::int64_t> padding;  // of each row, at the front of its K and V
};

/// A sequence whose decode graph appends to one buffer for each layer's K and V, in place; the
/// buffers grow by 256 positions, and each row's padding is left behind when they first do.
/// `shared` false: the graph joins past and new K/V into new tensors, which are handed to the next
/// step as they are.
std::unique_ptr<Sequence> make_sequence(const OrtGraph& embed, const OrtGraph& decode, bool shared,
                                        Prefilled prefilled);

}  // namespace skipvision
