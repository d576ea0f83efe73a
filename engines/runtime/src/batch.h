/// Prompts of different lengths as one (skipvision_export/runtime/batch.py).
#pragma once

#include <cstdint>
#include <vector>

#include "backend.h"
#include "layout.h"

namespace skipvision {

/// What prefill takes of B prompts, padded on the left to the longest one's S positions. Padding is
/// masked, sits at position 0, passes by every FFN, and keeps its K/V, so that all rows keep as
/// many.
struct PromptBatch {
  std::int64_t rows = 0;
  std::int64_t length = 0;
  std::int64_t kept = 0;
  std::vector<std::int64_t> padding;                            // [B], positions
  std::vector<std::int64_t> ids, mask, positions, image_index;  // [B, S]
  std::vector<std::vector<std::int64_t>> ffn_rows;              // of each used tier, of [B * S]
  std::vector<std::int64_t> kv_keep;                            // [B, kept]
};

/// Throws Error for prompts that do not hold as many pictures each.
PromptBatch batch_prompts(const std::vector<ModelInput>& inputs, std::int64_t image_token,
                          const Layout& layout);

}  // namespace skipvision
