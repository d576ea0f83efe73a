#include "layout.h"

#include <set>

namespace skipvision {

bool set_role(Run& run, const std::string& role) {
  bool skipped = role == "skipped";
  run.through_ffn = !skipped && role != "kv_only";
  run.keeps_kv = !skipped && role != "ffn_only";
  return skipped || role == "retained" || role == "summary" || role == "ffn_only" ||
         role == "kv_only" || role == "passed";
}

std::int64_t Layout::total() const {
  std::int64_t sum = 0;
  for (const Run& run : runs) sum += run.count;
  return sum;
}

std::vector<int> Layout::used_tiers() const {
  if (layer_tiers.empty()) return {1};
  std::set<int> distinct(layer_tiers.begin(), layer_tiers.end());
  distinct.erase(0);
  return {distinct.begin(), distinct.end()};
}

std::vector<bool> Layout::ffn_mask(int tier) const {
  std::vector<bool> flags;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    int own = tiers.empty() ? (runs[i].through_ffn ? 0 : 1) : tiers[i];
    flags.insert(flags.end(), runs[i].count, own < tier);
  }
  return flags;
}

std::vector<bool> Layout::kv_mask() const {
  std::vector<bool> flags;
  for (const Run& run : runs) flags.insert(flags.end(), run.count, run.keeps_kv);
  return flags;
}

std::string ffn_index_name(int tier) {
  return tier == 1 ? "ffn_index" : "ffn_index." + std::to_string(tier);
}

PrefillIndices prefill_indices(const std::vector<std::int64_t>& ids, std::int64_t image_token,
                               const Layout& layout) {
  PrefillIndices indices;
  auto kept = [&](const std::vector<bool>& flags) {
    std::vector<std::int64_t> rows;
    std::size_t place = 0;
    for (std::size_t i = 0; i < ids.size(); ++i)
      if (ids[i] != image_token || flags[place++ % flags.size()])
        rows.push_back(static_cast<std::int64_t>(i));
    return rows;
  };
  for (int tier : layout.used_tiers()) indices.ffn_rows.push_back(kept(layout.ffn_mask(tier)));
  std::vector<bool> kv = layout.kv_mask();
  indices.kv_keep = kept(kv);
  indices.image_index.assign(ids.size(), 0);
  std::size_t place = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] != image_token) continue;
    auto picture = static_cast<std::int64_t>(1 + place / kv.size());
    indices.image_index[i] = kv[place++ % kv.size()] ? picture : -picture;
  }
  return indices;
}

}  // namespace skipvision
