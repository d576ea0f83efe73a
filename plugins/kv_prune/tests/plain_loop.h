// Inputs with known content and the plain loop that every check compares with. Bytes only: the op moves, never computes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../kernel/kv_prune.h"

namespace skipvision::test {

enum class Layout { kOutOfPlace, kView, kPacked, kPadded };

inline const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::kOutOfPlace:
      return "out of place";
    case Layout::kView:
      return "in place, view";
    case Layout::kPacked:
      return "in place, packed";
    default:
      return "out of place, padded";
  }
}

// Sizes of one check. Bytes of a row: size * element.
struct Case {
  int64_t batch, heads, sequence, kept, size;
  int64_t element;
  Layout layout;

  int64_t row_bytes() const { return size * element; }
  bool in_place() const { return layout == Layout::kView || layout == Layout::kPacked; }
  int64_t output_head_rows() const {
    if (layout == Layout::kView) return sequence;
    return layout == Layout::kPadded ? kept + 3 : kept;
  }
  int64_t input_bytes() const { return batch * heads * sequence * row_bytes(); }
  int64_t output_bytes() const {
    return in_place() ? input_bytes() : batch * heads * output_head_rows() * row_bytes();
  }
  std::string text() const {
    std::string sizes;
    for (const int64_t n : {batch, heads, sequence, kept, size, element}) sizes += " " + std::to_string(n);
    return "[B H S K Dh element]" + sizes + ", " + name_of(layout);
  }
};

// B ascending rows of K distinct positions in [0, S).
inline std::vector<int64_t> random_keep(const Case& c, std::mt19937_64& random) {
  std::vector<int64_t> keep;
  std::vector<int64_t> positions(static_cast<size_t>(c.sequence));
  std::iota(positions.begin(), positions.end(), 0);
  for (int64_t b = 0; b < c.batch; ++b) {
    std::sample(positions.begin(), positions.end(), std::back_inserter(keep), c.kept, random);
  }
  return keep;
}

inline std::vector<unsigned char> random_bytes(int64_t count, std::mt19937_64& random) {
  std::vector<unsigned char> bytes(static_cast<size_t>(count));
  for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
  return bytes;
}

// What the output buffer must hold afterwards: `before` with the kept rows written into it. `shift` other than 0 gives
// the wrong answer on purpose.
inline std::vector<unsigned char> expected_output(const Case& c, const std::vector<int64_t>& keep,
                                                  const std::vector<unsigned char>& input,
                                                  std::vector<unsigned char> before, int64_t shift = 0) {
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t k = 0; k < c.kept; ++k) {
        const int64_t source = (keep[static_cast<size_t>(b * c.kept + k)] + shift) % c.sequence;
        const int64_t from = ((b * c.heads + h) * c.sequence + source) * c.row_bytes();
        const int64_t to = ((b * c.heads + h) * c.output_head_rows() + k) * c.row_bytes();
        std::copy_n(input.begin() + from, c.row_bytes(), before.begin() + to);
      }
    }
  }
  return before;
}

// In the packed layout rows behind the output are the input's own and may be anything; only the front counts.
inline int64_t checked_bytes(const Case& c) {
  return c.layout == Layout::kPacked ? c.batch * c.heads * c.kept * c.row_bytes() : c.output_bytes();
}

inline skipvision_kv_prune_params params_of(const Case& c, const void* key, const void* value, const int64_t* keep,
                                            void* key_out, void* value_out) {
  return {sizeof(skipvision_kv_prune_params),
          c.batch,
          c.heads,
          c.sequence,
          c.kept,
          c.row_bytes(),
          c.element,
          c.output_head_rows(),
          key,
          value,
          keep,
          key_out,
          value_out};
}

// Sizes that meet every access width (16, 8, element), several tiles, partial tiles, empty and full sets.
inline std::vector<Case> many_cases() {
  std::vector<Case> cases;
  const int64_t sizes[][4] = {{1, 1, 1, 1},  {1, 1, 7, 0},  {1, 3, 9, 9},   {2, 3, 17, 5},  {1, 4, 640, 192},
                              {3, 2, 50, 49}, {2, 5, 40, 1}, {0, 3, 4, 2},   {2, 0, 4, 2},   {2, 2, 0, 0},
                              {1, 2, 700, 600}, {5, 1, 31, 30}, {1, 1, 300, 150}};
  const int64_t head_sizes[] = {1, 3, 5, 8, 20, 63, 64, 80, 128, 129};
  for (const auto& s : sizes) {
    for (const int64_t size : head_sizes) {
      for (const int64_t element : {2, 4}) {
        for (const Layout layout : {Layout::kOutOfPlace, Layout::kView, Layout::kPacked, Layout::kPadded}) {
          cases.push_back({s[0], s[1], s[2], s[3], size, element, layout});
        }
      }
    }
  }
  cases.push_back({1, 2, 6, 4, 0, 2, Layout::kOutOfPlace});        // empty rows
  cases.push_back({1, 2, 6, 4, 40000, 4, Layout::kPacked});        // rows wider than a tile
  cases.push_back({1, 2, 6, 4, 40000, 4, Layout::kView});
  cases.push_back({1, 1, 5, 3, 40001, 2, Layout::kOutOfPlace});
  return cases;
}

}  // namespace skipvision::test
