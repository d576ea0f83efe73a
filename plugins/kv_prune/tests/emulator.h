// Runs the kernel's walk on the CPU, block by block, in orders a GPU may choose and a test can repeat.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "../kernel/kv_prune_index.h"
#include "../kernel/kv_prune_plan.h"

namespace skipvision::test {

// How blocks and the threads of a block take turns.
enum class Order { kAscending, kDescending, kInterleaved, kRandom };

// A walk broken on purpose; the checks must notice.
enum class Fault { kNone, kDescendingTiles, kNoBarrier, kHeadsOfPackedApart };

template <size_t bytes>
struct Unit {
  std::array<unsigned char, bytes> data;
};

// One block between two barriers: threads first store the tile they hold, then load the next one.
template <Mode mode, class U>
class Block {
 public:
  Block(const Plan& plan, int64_t x, int64_t y, Grid grid, const int64_t* keep, const U* input, U* output)
      : plan_(plan), keep_(keep), input_(input), output_(output), held_(threads_of(mode)) {
    walk<mode>(plan, x, y, grid.x, grid.y, [this](const Tile& tile) { tiles_.push_back(tile); });
  }

  void apply(Fault fault) {
    if (fault == Fault::kDescendingTiles) std::reverse(tiles_.begin(), tiles_.end());
    barrier_ = fault != Fault::kNoBarrier;
  }

  bool done() const { return next_ > tiles_.size(); }

  // Every thread runs until its next barrier. Without barriers a thread loads and stores before the next one starts.
  void advance(const std::vector<uint32_t>& threads) {
    for (const uint32_t thread : threads) {
      if (barrier_ && next_ > 0) store<mode>(plan_, tiles_[next_ - 1], output_, thread, held_[thread].units);
      if (next_ == tiles_.size()) continue;
      load<mode>(plan_, tiles_[next_], keep_, input_, thread, held_[thread].units);
      if (!barrier_) store<mode>(plan_, tiles_[next_], output_, thread, held_[thread].units);
    }
    ++next_;
  }

 private:
  struct Registers {
    U units[kItems];
  };

  const Plan& plan_;
  const int64_t* keep_;
  const U* input_;
  U* output_;
  std::vector<Registers> held_;
  std::vector<Tile> tiles_;
  size_t next_ = 0;
  bool barrier_ = true;
};

inline std::vector<uint32_t> thread_order(uint32_t count, Order order, std::mt19937_64& random) {
  std::vector<uint32_t> threads(count);
  for (uint32_t i = 0; i < count; ++i) threads[i] = i;
  if (order == Order::kDescending) std::reverse(threads.begin(), threads.end());
  if (order == Order::kRandom) std::shuffle(threads.begin(), threads.end(), random);
  return threads;
}

// Run all blocks of one tensor to their end.
template <Mode mode, class U>
void run_blocks(std::vector<Block<mode, U>>& blocks, Order order, std::mt19937_64& random) {
  const auto threads = thread_order(threads_of(mode), order, random);
  const bool whole = order == Order::kAscending || order == Order::kDescending;
  std::vector<size_t> waiting;
  for (size_t i = 0; i < blocks.size(); ++i) waiting.push_back(i);
  if (order == Order::kDescending) std::reverse(waiting.begin(), waiting.end());
  while (!waiting.empty()) {
    if (order == Order::kRandom) std::shuffle(waiting.begin(), waiting.end(), random);
    for (const size_t i : waiting) {
      do blocks[i].advance(threads);
      while (whole && !blocks[i].done());
    }
    waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [&](size_t i) { return blocks[i].done(); }),
                  waiting.end());
  }
}

// One tensor of a launch. `limit` bounds the grid, so that blocks loop.
template <Mode mode, size_t bytes>
void emulate(const Plan& plan, Grid limit, Order order, Fault fault, const int64_t* keep, const void* input,
             void* output, std::mt19937_64& random) {
  using U = Unit<bytes>;
  const Grid grid = grid_of<mode>(plan, limit);
  std::vector<Block<mode, U>> blocks;
  for (int64_t y = 0; y < grid.y; ++y) {
    for (int64_t x = 0; x < grid.x; ++x) {
      blocks.emplace_back(plan, x, y, grid, keep, static_cast<const U*>(input), static_cast<U*>(output));
      blocks.back().apply(fault);
    }
  }
  run_blocks<mode, U>(blocks, order, random);
}

template <size_t bytes>
void emulate(const Launch& launch, Grid limit, Order order, Fault fault, const int64_t* keep, const void* input,
             void* output, std::mt19937_64& random) {
  const bool apart = fault == Fault::kHeadsOfPackedApart && launch.mode == Mode::kInPlacePacked;
  if (launch.mode == Mode::kInPlaceView || apart) {
    emulate<Mode::kInPlaceView, bytes>(launch.plan, limit, order, fault, keep, input, output, random);
  } else if (launch.mode == Mode::kInPlacePacked) {
    emulate<Mode::kInPlacePacked, bytes>(launch.plan, limit, order, fault, keep, input, output, random);
  } else {
    emulate<Mode::kOutOfPlace, bytes>(launch.plan, limit, order, fault, keep, input, output, random);
  }
}

// What skipvision_kv_prune does with K or V of a prepared launch.
inline void emulate(const Launch& launch, Grid limit, Order order, Fault fault, const int64_t* keep, const void* input,
                    void* output, std::mt19937_64& random) {
  switch (launch.unit_bytes) {
    case 16:
      return emulate<16>(launch, limit, order, fault, keep, input, output, random);
    case 8:
      return emulate<8>(launch, limit, order, fault, keep, input, output, random);
    case 4:
      return emulate<4>(launch, limit, order, fault, keep, input, output, random);
    default:
      return emulate<2>(launch, limit, order, fault, keep, input, output, random);
  }
}

}  // namespace skipvision::test
