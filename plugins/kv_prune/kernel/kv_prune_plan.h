// Host side of a launch: are the arguments allowed, which access width and mode, how many blocks.
#pragma once

#include <cstdint>

#include "kv_prune.h"
#include "kv_prune_index.h"

namespace skipvision {

struct Grid {
  int64_t x, y;
};

// What CUDA allows along x and y; tests use smaller ones to exercise the loops over the grid.
constexpr Grid kGridLimit = {2147483647, 65535};

// A checked launch. `nothing` when there is no byte to move.
struct Launch {
  bool nothing;
  uint32_t unit_bytes;
  Mode mode;
  Plan plan;
};

namespace detail {

constexpr int64_t kSectorBytes = 32;   // what device memory moves at least; two blocks should not share one
constexpr int64_t kWantedBlocks = 512;  // enough to fill today's largest GPUs a few times

// Sizes of the tensors in bytes.
struct Extents {
  int64_t input, output, keep_index;
};

// a * b * c; false past 63 bits.
inline bool product(int64_t a, int64_t b, int64_t c, int64_t& result) {
  int64_t first = 0;
  return !__builtin_mul_overflow(a, b, &first) && !__builtin_mul_overflow(first, c, &result);
}

inline bool measure(const skipvision_kv_prune_params& p, Extents& bytes) {
  int64_t all_heads = 0;
  int64_t padded = 0;
  const bool fits = product(p.batch, p.heads, 1, all_heads) &&
                    product(all_heads, p.sequence, p.row_bytes, bytes.input) &&
                    product(all_heads, p.output_head_rows, p.row_bytes, padded) &&
                    product(p.batch, p.kept, sizeof(int64_t), bytes.keep_index) && p.row_bytes < (int64_t{1} << 31);
  if (fits) bytes.output = padded - (p.output_head_rows - p.kept) * p.row_bytes;
  return fits;
}

inline bool sizes_are_right(const skipvision_kv_prune_params& p) {
  const bool element = p.element_bytes == 2 || p.element_bytes == 4;
  return p.struct_bytes == sizeof(skipvision_kv_prune_params) && element && p.batch >= 0 && p.heads >= 0 &&
         p.kept >= 0 && p.kept <= p.sequence && p.row_bytes >= 0 && p.row_bytes % p.element_bytes == 0 &&
         p.output_head_rows >= p.kept;
}

inline uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// All addresses and the row's bytes or-ed: its trailing zeros are the common alignment.
inline uint64_t common_bits(const skipvision_kv_prune_params& p) {
  return address(p.key) | address(p.value) | address(p.key_out) | address(p.value_out) |
         static_cast<uint64_t>(p.row_bytes);
}

inline bool overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  return address(a) < address(b) + static_cast<uint64_t>(b_bytes) &&
         address(b) < address(a) + static_cast<uint64_t>(a_bytes);
}

inline bool in_place(const skipvision_kv_prune_params& p) { return p.key == p.key_out || p.value == p.value_out; }

inline bool overlap_is_allowed(const skipvision_kv_prune_params& p, const Extents& bytes) {
  const bool layout = p.output_head_rows == p.sequence || p.output_head_rows == p.kept;
  if (in_place(p) && !layout) return false;
  const auto clash = [&](const void* output, const void* own, const void* other) {
    return (output != own && overlap(output, bytes.output, own, bytes.input)) ||
           overlap(output, bytes.output, other, bytes.input) ||
           overlap(output, bytes.output, p.keep_index, bytes.keep_index);
  };
  return !clash(p.key_out, p.key, p.value) && !clash(p.value_out, p.value, p.key) &&
         !overlap(p.key_out, bytes.output, p.value_out, bytes.output);
}

// One head alone is a view in both layouts.
inline Mode choose_mode(const skipvision_kv_prune_params& p) {
  if (!in_place(p)) return Mode::kOutOfPlace;
  return p.output_head_rows == p.sequence || p.batch * p.heads == 1 ? Mode::kInPlaceView : Mode::kInPlacePacked;
}

inline uint32_t choose_unit(const skipvision_kv_prune_params& p) {
  const uint64_t bits = common_bits(p);
  if (bits % 16 == 0) return 16;
  if (bits % 8 == 0) return 8;
  return static_cast<uint32_t>(p.element_bytes);
}

// Columns of one block, in place: whole sectors, halved until there are enough blocks. No wider than a tile, so that a
// tile holds at least one row.
inline uint32_t choose_chunk(Mode mode, const Plan& plan, uint32_t unit_bytes) {
  const int64_t sector = kSectorBytes / unit_bytes;
  const int64_t row_sectors = divide_up(plan.row_units, sector);
  const int64_t walks = 2 * (mode == Mode::kInPlacePacked ? 1 : plan.all_heads);
  int64_t sectors = row_sectors < slots_of(mode) / sector ? row_sectors : slots_of(mode) / sector;
  while (sectors > 1 && walks * divide_up(row_sectors, sectors) < kWantedBlocks) sectors = divide_up(sectors, 2);
  return static_cast<uint32_t>(sectors * sector);
}

}  // namespace detail

// Check the arguments and choose width and mode. Returns a SKIPVISION_KV_PRUNE_ status; `launch` is set when it is OK.
inline int prepare(const skipvision_kv_prune_params& p, Launch& launch) {
  using namespace detail;
  if (!sizes_are_right(p)) return SKIPVISION_KV_PRUNE_BAD_ARGUMENT;
  launch = {};
  launch.nothing = p.batch == 0 || p.heads == 0 || p.kept == 0 || p.row_bytes == 0;
  if (launch.nothing) return SKIPVISION_KV_PRUNE_OK;
  Extents bytes{};
  if (!measure(p, bytes)) return SKIPVISION_KV_PRUNE_TOO_LARGE;
  if (!p.key || !p.value || !p.keep_index || !p.key_out || !p.value_out) return SKIPVISION_KV_PRUNE_BAD_ARGUMENT;
  const auto element = static_cast<uint64_t>(p.element_bytes);
  if (common_bits(p) % element || address(p.keep_index) % alignof(int64_t)) return SKIPVISION_KV_PRUNE_MISALIGNED;
  if (!overlap_is_allowed(p, bytes)) return SKIPVISION_KV_PRUNE_OVERLAP;
  // Every row of a full set stays where it is.
  launch.nothing = p.kept == p.sequence && p.output_head_rows == p.kept && p.key == p.key_out && p.value == p.value_out;
  launch.unit_bytes = choose_unit(p);
  launch.mode = choose_mode(p);
  const auto row_units = static_cast<uint32_t>(p.row_bytes / launch.unit_bytes);
  launch.plan = {p.heads, p.batch * p.heads, p.sequence, p.kept, p.output_head_rows, row_units, row_units};
  if (launch.mode != Mode::kOutOfPlace) {
    launch.plan.chunk_units = choose_chunk(launch.mode, launch.plan, launch.unit_bytes);
  }
  return SKIPVISION_KV_PRUNE_OK;
}

// Blocks along x and y; more work than `limit` is walked by loops in the kernel. Along z stand key and value.
template <Mode mode>
Grid grid_of(const Plan& plan, Grid limit = kGridLimit) {
  const int64_t x = work_x<mode>(plan);
  const int64_t y = work_y<mode>(plan);
  return {x < limit.x ? x : limit.x, y < limit.y ? y : limit.y};
}

}  // namespace skipvision
