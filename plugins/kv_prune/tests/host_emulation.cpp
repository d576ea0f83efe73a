// The kernel's index arithmetic and walk on the CPU: every width and mode, in block orders chosen to hurt.
//
//   host_emulation [--break descending|no-barrier|heads-apart|shift|narrow]
//
// Exits 0, or 1 with the mismatches. --break runs a walk or a comparison that is wrong on purpose: it must exit 1.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "emulator.h"
#include "plain_loop.h"

namespace {

using namespace skipvision;
using namespace skipvision::test;

struct Options {
  Fault fault = Fault::kNone;
  int64_t shift = 0;
  bool narrow = false;
};

int failures = 0;
int checks = 0;

void check(bool right, const std::string& what) {
  ++checks;
  if (right) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// Heap memory that ends where the tensor ends (ASan sees the next byte), `offset` bytes past a multiple of 16.
class Memory {
 public:
  Memory(const std::vector<unsigned char>& content, size_t offset)
      : block_(new unsigned char[content.size() + offset]), offset_(offset) {
    if (!content.empty()) std::memcpy(data(), content.data(), content.size());
  }
  unsigned char* data() { return block_.get() + offset_; }

 private:
  std::unique_ptr<unsigned char[]> block_;
  size_t offset_;
};

// K or V of one case, under one order; the caller says which with `input`.
void check_order(const Case& c, size_t offset, Order order, Grid limit, const Options& options,
                 std::mt19937_64& random) {
  const auto keep = random_keep(c, random);
  const auto input = random_bytes(c.input_bytes(), random);
  const auto before = c.in_place() ? input : random_bytes(c.output_bytes(), random);
  Memory key(input, offset), value(input, offset), key_out(before, offset), value_out(before, offset);
  void* targets[] = {c.in_place() ? key.data() : key_out.data(), c.in_place() ? value.data() : value_out.data()};
  const auto params = params_of(c, key.data(), value.data(), keep.data(), targets[0], targets[1]);
  Launch launch{};
  if (prepare(params, launch) != SKIPVISION_KV_PRUNE_OK) return check(false, c.text() + ": refused");
  if (!launch.nothing) {
    emulate(launch, limit, order, options.fault, keep.data(), key.data(), targets[0], random);
  }
  const auto wanted = expected_output(c, keep, input, before, options.shift);
  const auto bytes = static_cast<size_t>(checked_bytes(c));
  const bool same = bytes == 0 || std::memcmp(targets[0], wanted.data(), bytes) == 0;
  check(same, c.text() + ", order " + std::to_string(static_cast<int>(order)));
}

// Stops after ten failures: a broken walk gets most cases wrong.
void check_cases(const Options& options) {
  std::mt19937_64 random(1);
  for (const Case& c : many_cases()) {
    if (failures >= 10) return;
    check_order(c, 0, Order::kAscending, kGridLimit, options, random);
    check_order(c, 0, Order::kRandom, {3, 2}, options, random);
    if (c.input_bytes() > 300000) continue;
    check_order(c, 0, Order::kDescending, kGridLimit, options, random);
    check_order(c, 8, Order::kInterleaved, kGridLimit, options, random);
    check_order(c, 4, Order::kDescending, {1, 1}, options, random);
  }
}

// `narrow` stands for a kernel that keeps offsets in 32 bits.
int64_t offset_of(int64_t value, const Options& options) {
  return options.narrow ? static_cast<int32_t>(value) : value;
}

// Slots of one tile of a tensor too large to allocate, against the same offsets in 128 bits.
template <Mode mode>
void check_tile(const Plan& plan, const Tile& tile, const Options& options) {
  for (const uint32_t slot : {0U, 1U, tile.slots / 2, tile.slots - 1}) {
    Place place{};
    if (!locate<mode>(plan, tile, slot, place)) continue;
    if (failures >= 10) return;
    const __int128 unit = static_cast<__int128>(tile.shift) + slot;
    const __int128 row = tile.row + unit / tile.width;
    const __int128 head = mode == Mode::kInPlacePacked ? row / plan.kept : static_cast<__int128>(tile.head);
    const __int128 position = mode == Mode::kInPlacePacked ? row % plan.kept : row;
    const __int128 column = tile.column + unit % tile.width;
    const __int128 output = (head * plan.output_head_rows + position) * plan.row_units + column;
    const __int128 origin = head * plan.sequence * plan.row_units + column;
    check(offset_of(output_unit(plan, place), options) == output, "output offset past 2^31");
    check(offset_of(input_origin(plan, place), options) == origin, "input offset past 2^31");
    check(place.keep_at == head / plan.heads * plan.kept + position, "keep_index offset past 2^31");
  }
}

template <Mode mode>
void check_far_blocks(const Plan& plan, const Options& options) {
  const int64_t last_x = work_x<mode>(plan) - 1;
  const int64_t last_y = work_y<mode>(plan) - 1;
  for (const int64_t y : {int64_t{0}, last_y / 2, last_y}) {
    for (const int64_t x : {int64_t{0}, last_x / 2, last_x}) {
      if constexpr (mode == Mode::kOutOfPlace) {
        check_tile<mode>(plan, run_tile(plan, x, y), options);
      } else {
        Tile tile = chunk_tile<mode>(plan, x, y);
        const int64_t step = tile.slots / tile.width;
        for (const int64_t part : {0, 1, 2}) {
          tile.row = (tile.end_row - 1) / step * part / 2 * step;
          check_tile<mode>(plan, tile, options);
        }
      }
    }
  }
}

// B, H, S, K of up to 2^31, with all offsets below 2^63.
void check_huge(const Options& options) {
  const int64_t big = int64_t{1} << 31;
  for (const Plan& sizes : {Plan{1, big, 4096, 4000, 4096, 16, 4}, Plan{32, 32, big, big - 1, big, 16, 4},
                            Plan{8, 8 * 100000, 100000, 99999, 99999, 10, 2},
                            Plan{1, 1, 3, 2, 3, (1U << 30) - 1, 128}}) {
    check_far_blocks<Mode::kOutOfPlace>(sizes, options);
    check_far_blocks<Mode::kInPlaceView>(sizes, options);
    Plan packed = sizes;
    packed.output_head_rows = packed.kept;
    check_far_blocks<Mode::kInPlacePacked>(packed, options);
  }
}

void check_status(int wanted, const skipvision_kv_prune_params& params, const char* what) {
  Launch launch{};
  check(prepare(params, launch) == wanted, what);
}

void check_sizes() {
  alignas(16) static unsigned char memory[4096];
  alignas(8) static int64_t keep[4];
  const Case c{1, 2, 8, 4, 8, 2, Layout::kOutOfPlace};
  const auto good = params_of(c, memory, memory + 1024, keep, memory + 2048, memory + 3072);
  check_status(SKIPVISION_KV_PRUNE_OK, good, "good arguments");
  const auto refuse = [&](int status, const char* what, auto change) {
    auto params = good;
    change(params);
    check_status(status, params, what);
  };
  using Params = skipvision_kv_prune_params;
  const int bad = SKIPVISION_KV_PRUNE_BAD_ARGUMENT;
  refuse(bad, "another struct", [](Params& p) { p.struct_bytes -= 8; });
  refuse(bad, "negative batch", [](Params& p) { p.batch = -1; });
  refuse(bad, "negative heads", [](Params& p) { p.heads = -1; });
  refuse(bad, "K above S", [](Params& p) { p.kept = 9; });
  refuse(bad, "negative K", [](Params& p) { p.kept = -1; });
  refuse(bad, "element of 8 bytes", [](Params& p) { p.element_bytes = 8; });
  refuse(bad, "half an element", [](Params& p) { p.row_bytes = 15; });
  refuse(bad, "output stride below K", [](Params& p) { p.output_head_rows = 3; });
  refuse(bad, "no key", [](Params& p) { p.key = nullptr; });
  refuse(bad, "no keep_index", [](Params& p) { p.keep_index = nullptr; });
  refuse(bad, "no output", [](Params& p) { p.value_out = nullptr; });
  const int large = SKIPVISION_KV_PRUNE_TOO_LARGE;
  refuse(large, "2^64 bytes", [](Params& p) { p.batch = p.heads = p.sequence = int64_t{1} << 31; });
  refuse(large, "row of 2^31 bytes", [](Params& p) { p.row_bytes = int64_t{1} << 31; });
  refuse(large, "padded past 2^63", [](Params& p) { p.output_head_rows = INT64_MAX; });
  refuse(SKIPVISION_KV_PRUNE_MISALIGNED, "odd key", [](Params& p) { p.key = memory + 1; });
  refuse(SKIPVISION_KV_PRUNE_OK, "nothing to do, no pointers", [](Params& p) {
    p.kept = 0;
    p.key = p.value = p.key_out = p.value_out = nullptr;
    p.keep_index = nullptr;
  });
}

void check_overlaps() {
  alignas(16) static unsigned char memory[4096];
  alignas(8) static int64_t keep[4];
  const Case c{1, 2, 8, 4, 8, 2, Layout::kOutOfPlace};
  const auto status = [&](int wanted, const char* what, const void* key, const void* value, void* key_out,
                          void* value_out, int64_t rows) {
    auto params = params_of(c, key, value, keep, key_out, value_out);
    params.output_head_rows = rows;
    check_status(wanted, params, what);
  };
  const int refused = SKIPVISION_KV_PRUNE_OVERLAP;
  unsigned char *a = memory, *b = memory + 1024, *d = memory + 2048, *e = memory + 3072;
  status(SKIPVISION_KV_PRUNE_OK, "both in place, packed", a, b, a, b, 4);
  status(SKIPVISION_KV_PRUNE_OK, "both in place, view", a, b, a, b, 8);
  status(SKIPVISION_KV_PRUNE_OK, "only key in place", a, b, a, e, 8);
  status(SKIPVISION_KV_PRUNE_OK, "key and value the same memory", a, a, d, e, 4);
  status(refused, "in place, another stride", a, b, a, b, 6);
  status(refused, "in place, stride above S", a, b, a, b, 9);
  status(refused, "16 bytes into its input", a, b, a + 16, e, 4);
  status(refused, "16 bytes before its input", d, b, d - 16, e, 4);
  status(refused, "swapped", a, b, b, a, 8);
  status(refused, "into the other's input", a, b, b, e, 4);
  status(refused, "one output for both", a, b, d, d, 4);
  status(refused, "same input and output for both", a, a, a, a, 8);
  auto params = params_of(c, a, b, keep, d, keep);
  check_status(refused, params, "output on keep_index");
}

bool parse(int count, char** arguments, Options& options) {
  if (count == 1) return true;
  if (count != 3 || std::string(arguments[1]) != "--break") return false;
  const std::string what = arguments[2];
  options.narrow = what == "narrow";
  options.shift = what == "shift";
  if (what == "descending") options.fault = Fault::kDescendingTiles;
  if (what == "no-barrier") options.fault = Fault::kNoBarrier;
  if (what == "heads-apart") options.fault = Fault::kHeadsOfPackedApart;
  return options.narrow || options.shift != 0 || options.fault != Fault::kNone;
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  if (!parse(count, arguments, options)) {
    std::printf("usage: host_emulation [--break descending|no-barrier|heads-apart|shift|narrow]\n");
    return 2;
  }
  check_sizes();
  check_overlaps();
  check_huge(options);
  check_cases(options);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
