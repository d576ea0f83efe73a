#include "ort_backend.h"

#include "layout.h"
#include "ort_sequence.h"
#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

constexpr char kShared[] = "decoder_decode.onnxruntime";

std::string ffn_index_name(int tier) {
  return tier == 1 ? "ffn_index" : "ffn_index." + std::to_string(tier);
}

}  // namespace

OrtBackend::OrtBackend(const std::filesystem::path& folder, const Manifest& manifest, int threads)
    : manifest_(manifest), env_(nullptr) {
  check_onnxruntime();
  env_ = Ort::Env(ORT_LOGGING_LEVEL_ERROR, "skipvision");
  weights_ = std::make_unique<SharedWeights>();
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  options.SetGraphOptimizationLevel(ORT_ENABLE_ALL);
  auto load = [&](const std::string& name, const Ort::SessionOptions& own) {
    return std::make_unique<OrtGraph>(env_, folder, manifest.graph(name), own, weights_->packed());
  };
  vision_ = load("vision_encoder", options);
  embed_ = load("embed_tokens", options);
  auto load_decoder = [&](const std::string& name) {
    Ort::SessionOptions own = options.Clone();
    weights_->add_to(own, folder / manifest.graph(name).file);
    // It would turn every referenced matrix into a copy, before they become FusedMatMul.
    if (manifest.references && manifest.dtype == "float32")
      own.AddConfigEntry("optimization.disable_specified_optimizers", "ConstantFolding");
    return load(name, own);
  };
  prefill_ = load_decoder("decoder_prefill");
  shared_cache_ = manifest.graphs.count(kShared) > 0;
  decode_ = load_decoder(shared_cache_ ? kShared : "decoder_decode");
}

Ort::Value OrtBackend::embed(const ModelInput& input, Ort::Value features) const {
  std::vector<std::int64_t> ids = input.ids;
  OrtGraph::Feeds feeds;
  feeds.emplace_back("input_ids", view(ids, {1, static_cast<std::int64_t>(ids.size())}));
  feeds.emplace_back("image_features", std::move(features));
  return std::move(embed_->run(feeds).at(0));
}

std::unique_ptr<Sequence> OrtBackend::prefill(const ModelInput& input) const {
  OrtGraph::Feeds picture;
  picture.emplace_back("pixel_values",
                       make_tensor(vision_->input_dtype("pixel_values"),
                                   {1, 3, input.height, input.width}, input.pixels));
  Ort::Value features = std::move(vision_->run(picture).at(0));

  auto length = static_cast<std::int64_t>(input.ids.size());
  PrefillIndices indices = prefill_indices(input.ids, manifest_.image_token_id, manifest_.layout);
  std::vector<std::int64_t> mask(length, 1), positions(length);
  for (std::int64_t i = 0; i < length; ++i) positions[i] = i;
  OrtGraph::Feeds feeds;
  feeds.emplace_back("inputs_embeds", embed(input, std::move(features)));
  feeds.emplace_back("attention_mask", view(mask, {1, length}));
  feeds.emplace_back("position_ids", view(positions, {1, length}));
  std::vector<int> tiers = manifest_.layout.used_tiers();
  for (std::size_t i = 0; i < tiers.size(); ++i) {
    auto& rows = indices.ffn_rows[i];
    feeds.emplace_back(ffn_index_name(tiers[i]),
                       view(rows, {static_cast<std::int64_t>(rows.size())}));
  }
  feeds.emplace_back("kv_keep_index",
                     view(indices.kv_keep, {1, static_cast<std::int64_t>(indices.kv_keep.size())}));
  if (prefill_->info().has_input("image_index"))
    feeds.emplace_back("image_index", view(indices.image_index, {1, length}));
  Prefilled prefilled{prefill_->run(feeds),
                      &prefill_->info().outputs,
                      {0, manifest_.visual_tokens, manifest_.hidden_size}};
  return make_sequence(*embed_, *decode_, shared_cache_, std::move(prefilled));
}

}  // namespace skipvision
