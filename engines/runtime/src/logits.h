#pragma once

#include <cstddef>
#include <vector>

namespace skipvision {

/// The scores of one position, [vocab], in memory that outlives it.
struct Logits {
  Logits(const float* values, std::size_t count) : data(values), size(count) {}
  Logits(const std::vector<float>& values) : Logits(values.data(), values.size()) {}

  const float* begin() const { return data; }
  const float* end() const { return data + size; }
  float operator[](std::size_t i) const { return data[i]; }

  const float* data;
  std::size_t size;
};

}  // namespace skipvision
