/// The visual tokens of one image as the decoder sees them (skipvision_export/layout.py).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace skipvision {

/// `count` tokens of one role, in layout order.
struct Run {
  bool through_ffn = true;
  bool keeps_kv = true;
  std::int64_t count = 0;
};

struct Layout {
  std::vector<Run> runs;
  std::vector<int> tiers;        // of each run; empty: 1 where the role skips the FFN
  std::vector<int> layer_tiers;  // of each layer; empty: 1 everywhere

  std::int64_t total() const;
  /// Distinct tiers above 0 of the layers, ascending; each has an index of rows of its own.
  std::vector<int> used_tiers() const;
  /// One flag for each visual token: whether it goes through the FFN of a layer of `tier`.
  std::vector<bool> ffn_mask(int tier) const;
  /// One flag for each visual token: whether its keys and values outlive prefill.
  std::vector<bool> kv_mask() const;
};

/// Whether `role` is known; fills in what it means for a run.
bool set_role(Run& run, const std::string& role);

/// The input that holds the rows of a tier.
std::string ffn_index_name(int tier);

/// What prefill is fed for one prompt; `ids` hold layout.total() placeholders for each picture.
struct PrefillIndices {
  std::vector<std::vector<std::int64_t>> ffn_rows;  // of each used tier, ascending
  std::vector<std::int64_t> kv_keep;                // positions, ascending
  std::vector<std::int64_t> image_index;            // 0 text, +-i picture i; negative: K/V dropped
};

PrefillIndices prefill_indices(const std::vector<std::int64_t>& ids, std::int64_t image_token,
                               const Layout& layout);

}  // namespace skipvision
