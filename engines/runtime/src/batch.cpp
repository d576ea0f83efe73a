#include "batch.h"

#include <algorithm>

#include "skipvision/skipvision.h"

namespace skipvision {

PromptBatch batch_prompts(const std::vector<ModelInput>& inputs, std::int64_t image_token,
                          const Layout& layout) {
  PromptBatch batch;
  batch.rows = static_cast<std::int64_t>(inputs.size());
  for (const ModelInput& input : inputs)
    batch.length = std::max(batch.length, static_cast<std::int64_t>(input.ids.size()));
  batch.ffn_rows.resize(layout.used_tiers().size());
  std::int64_t first = 0;  // of the row's positions among [B * S]
  for (const ModelInput& input : inputs) {
    std::int64_t padding = batch.length - static_cast<std::int64_t>(input.ids.size());
    PrefillIndices own = prefill_indices(input.ids, image_token, layout);
    batch.padding.push_back(padding);
    // Any id but the picture's.
    batch.ids.insert(batch.ids.end(), padding, image_token == 0 ? 1 : 0);
    batch.ids.insert(batch.ids.end(), input.ids.begin(), input.ids.end());
    batch.image_index.insert(batch.image_index.end(), padding, 0);
    batch.image_index.insert(batch.image_index.end(), own.image_index.begin(),
                             own.image_index.end());
    for (std::int64_t i = 0; i < batch.length; ++i) {
      batch.mask.push_back(i >= padding);
      batch.positions.push_back(std::max<std::int64_t>(i - padding, 0));
    }
    for (std::size_t tier = 0; tier < own.ffn_rows.size(); ++tier)
      for (std::int64_t row : own.ffn_rows[tier])
        batch.ffn_rows[tier].push_back(first + padding + row);
    for (std::int64_t i = 0; i < padding; ++i) batch.kv_keep.push_back(i);
    for (std::int64_t i : own.kv_keep) batch.kv_keep.push_back(padding + i);
    std::int64_t kept = padding + static_cast<std::int64_t>(own.kv_keep.size());
    if (first > 0 && kept != batch.kept)
      throw Error("prompts of one batch hold different numbers of pictures; ask them apart");
    batch.kept = kept;
    first += batch.length;
  }
  return batch;
}

}  // namespace skipvision
