// Which thread copies which bytes, and in which order: the whole arithmetic of the kernel.
//
// Compiled by nvcc for the device and by a plain C++ compiler for the emulation in tests/, so that a machine without
// a GPU runs the same walk. Words: a unit is one access (16, 8, 4 or 2 bytes), a head is one (b, h) pair, a tile is
// what a block holds in registers at one time.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SKIPVISION_BOTH __host__ __device__ __forceinline__
#define SKIPVISION_DEVICE __device__ __forceinline__
#define SKIPVISION_UNROLL _Pragma("unroll")
#else
#define SKIPVISION_BOTH inline
#define SKIPVISION_DEVICE inline
#define SKIPVISION_UNROLL
#endif

// keep_index outside its contract is undefined behaviour; this macro makes a debug build stop instead.
#if defined(SKIPVISION_KV_PRUNE_CHECK) && defined(__CUDA_ARCH__)
#define SKIPVISION_REQUIRE(condition) ((condition) ? (void)0 : __trap())
#elif defined(SKIPVISION_KV_PRUNE_CHECK)
#define SKIPVISION_REQUIRE(condition) ((condition) ? (void)0 : __builtin_trap())
#else
#define SKIPVISION_REQUIRE(condition) ((void)0)
#endif

namespace skipvision {

// Out of place every tile is independent. In place a block owns columns and walks its rows in ascending order:
// dest(row) <= source(row) and both ascend, so what a tile overwrites has been read by it or by an earlier one.
enum class Mode {
  kOutOfPlace,     // tiles are runs of units of one head; any number of blocks
  kInPlaceView,    // a block walks the rows of one head: heads do not touch each other's rows
  kInPlacePacked,  // a block walks the rows of all heads: a head's output lies in earlier heads' input
};

// Loads a thread issues before its first store; with 16-byte units 64 bytes are in flight per thread.
constexpr uint32_t kItems = 4;

// Packed leaves few blocks (columns only), so they are large; 1024 threads would leave too few registers (spills).
SKIPVISION_BOTH constexpr uint32_t threads_of(Mode mode) { return mode == Mode::kInPlacePacked ? 512 : 256; }

SKIPVISION_BOTH constexpr uint32_t slots_of(Mode mode) { return threads_of(mode) * kItems; }

// A launch, in units; passed to the kernel by value.
struct Plan {
  int64_t heads;             // H
  int64_t all_heads;         // B * H
  int64_t sequence;          // S
  int64_t kept;              // K
  int64_t output_head_rows;  // rows between two heads of an output
  uint32_t row_units;        // units of one row
  uint32_t chunk_units;      // in place: columns that one block owns
};

// Part of the work of one block. Slot j (of `slots`) is column (shift + j) % width of row (shift + j) / width.
struct Tile {
  int64_t head;       // b * H + h; unused when packed, where `row` counts through all heads
  int64_t keep_from;  // b * K, where the batch's indices start; unused when packed
  int64_t row;
  int64_t end_row;
  uint32_t column;
  uint32_t shift;
  uint32_t width;
  uint32_t slots;
};

// One unit to copy; `keep_at` says where in keep_index its source row is found.
struct Place {
  int64_t head;
  int64_t position;  // k
  int64_t keep_at;   // b * K + k
  uint32_t column;
};

SKIPVISION_BOTH int64_t divide_up(int64_t amount, int64_t part) { return (amount + part - 1) / part; }

// Work items along the grid's x: tiles of a head, or column chunks.
template <Mode mode>
SKIPVISION_BOTH int64_t work_x(const Plan& plan) {
  if (mode == Mode::kOutOfPlace) return divide_up(plan.kept * plan.row_units, slots_of(mode));
  return divide_up(plan.row_units, plan.chunk_units);
}

// Work items along the grid's y: heads; when packed a block takes them all.
template <Mode mode>
SKIPVISION_BOTH int64_t work_y(const Plan& plan) {
  return mode == Mode::kInPlacePacked ? 1 : plan.all_heads;
}

// The run of units of one head that starts at tile x. Its divisions of 64 bits are here, once per tile, not per unit.
SKIPVISION_DEVICE Tile run_tile(const Plan& plan, int64_t x, int64_t head) {
  const int64_t start = x * slots_of(Mode::kOutOfPlace);
  const int64_t row = start / plan.row_units;
  const auto shift = static_cast<uint32_t>(start - row * plan.row_units);
  return {head, head / plan.heads * plan.kept, row, plan.kept, 0, shift, plan.row_units, slots_of(Mode::kOutOfPlace)};
}

// The tile of column chunk x that starts at `row`.
template <Mode mode>
SKIPVISION_DEVICE Tile chunk_tile(const Plan& plan, int64_t x, int64_t head) {
  const auto column = static_cast<uint32_t>(x * plan.chunk_units);
  const uint32_t left = plan.row_units - column;
  const uint32_t width = left < plan.chunk_units ? left : plan.chunk_units;
  const int64_t rows = mode == Mode::kInPlacePacked ? plan.all_heads * plan.kept : plan.kept;
  return {head, head / plan.heads * plan.kept, 0, rows, column, 0, width, slots_of(mode) / width * width};
}

// Calls body(tile) for every tile of a block, in order; the same number of times in each of its threads.
template <Mode mode, class Body>
SKIPVISION_DEVICE void walk(const Plan& plan, int64_t block_x, int64_t block_y, int64_t grid_x, int64_t grid_y,
                            Body&& body) {
  for (int64_t y = block_y; y < work_y<mode>(plan); y += grid_y) {
    for (int64_t x = block_x; x < work_x<mode>(plan); x += grid_x) {
      if constexpr (mode == Mode::kOutOfPlace) {
        body(run_tile(plan, x, y));
      } else {
        Tile tile = chunk_tile<mode>(plan, x, y);
        for (; tile.row < tile.end_row; tile.row += tile.slots / tile.width) body(tile);
      }
    }
  }
}

// Where slot `slot` of a tile lies. Returns false for a slot past the tile's end.
template <Mode mode>
SKIPVISION_DEVICE bool locate(const Plan& plan, const Tile& tile, uint32_t slot, Place& place) {
  const uint32_t unit = tile.shift + slot;  // both below 2^31
  const uint32_t row_in_tile = unit / tile.width;
  const int64_t row = tile.row + row_in_tile;
  if (slot >= tile.slots || row >= tile.end_row) return false;
  place.column = tile.column + unit - row_in_tile * tile.width;
  if constexpr (mode == Mode::kInPlacePacked) {
    place.head = row / plan.kept;
    place.position = row - place.head * plan.kept;
    place.keep_at = place.head / plan.heads * plan.kept + place.position;
  } else {
    place.head = tile.head;
    place.position = row;
    place.keep_at = tile.keep_from + row;
  }
  return true;
}

// Offset in units of a place's column in row 0 of its head in the input; row s lies s * row_units further.
SKIPVISION_DEVICE int64_t input_origin(const Plan& plan, const Place& place) {
  return place.head * plan.sequence * plan.row_units + place.column;
}

// Offset in units of a place in the output.
SKIPVISION_DEVICE int64_t output_unit(const Plan& plan, const Place& place) {
  return (place.head * plan.output_head_rows + place.position) * plan.row_units + place.column;
}

// Read one thread's share of a tile. Two loops, so that all indices and then all units are under way together.
template <Mode mode, class Unit>
SKIPVISION_DEVICE void load(const Plan& plan, const Tile& tile, const int64_t* keep_index, const Unit* input,
                            uint32_t thread, Unit (&held)[kItems]) {
  int64_t origins[kItems];
  int64_t sources[kItems];
  SKIPVISION_UNROLL
  for (uint32_t item = 0; item < kItems; ++item) {
    Place place;
    const bool inside = locate<mode>(plan, tile, thread + item * threads_of(mode), place);
    sources[item] = inside ? keep_index[place.keep_at] : -1;
    origins[item] = inside ? input_origin(plan, place) : 0;
    SKIPVISION_REQUIRE(!inside || (sources[item] >= 0 && sources[item] < plan.sequence));
    SKIPVISION_REQUIRE(!inside || mode == Mode::kOutOfPlace || sources[item] >= place.position);
  }
  SKIPVISION_UNROLL
  for (uint32_t item = 0; item < kItems; ++item) {
    if (sources[item] >= 0) held[item] = input[origins[item] + sources[item] * plan.row_units];
  }
}

// Write one thread's share of a tile. In place, only after every thread of the block has read its share; that one
// barrier per tile is enough, since the next tile's loads lie behind all that this tile writes.
template <Mode mode, class Unit>
SKIPVISION_DEVICE void store(const Plan& plan, const Tile& tile, Unit* output, uint32_t thread,
                             const Unit (&held)[kItems]) {
  SKIPVISION_UNROLL
  for (uint32_t item = 0; item < kItems; ++item) {
    Place place;
    if (locate<mode>(plan, tile, thread + item * threads_of(mode), place)) {
      output[output_unit(plan, place)] = held[item];
    }
  }
}

}  // namespace skipvision
