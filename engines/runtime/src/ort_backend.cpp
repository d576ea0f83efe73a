#include "ort_backend.h"

#include <algorithm>

#include "ort_sequence.h"
#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

constexpr char kPrefill[] = "decoder_prefill";
constexpr char kDecode[] = "decoder_decode";

/// The manifest's name of a graph's variant for this runtime.
std::string variant(const std::string& graph) { return graph + ".onnxruntime"; }

}  // namespace

OrtBackend::OrtBackend(const std::filesystem::path& folder, const Manifest& manifest, int threads)
    : folder_(folder), manifest_(manifest), env_(nullptr), options_(nullptr) {
  check_onnxruntime();
  env_ = Ort::Env(ORT_LOGGING_LEVEL_ERROR, "skipvision");
  options_ = Ort::SessionOptions();
  options_.SetIntraOpNumThreads(threads);
  options_.SetGraphOptimizationLevel(ORT_ENABLE_ALL);
  weights_ = std::make_unique<SharedWeights>();
  vision_ = load("vision_encoder");
  embed_ = load("embed_tokens");
  prefill_ = load_decoder(manifest.graphs.count(variant(kPrefill)) ? variant(kPrefill) : kPrefill);
  shared_cache_ = manifest.graphs.count(variant(kDecode)) > 0;
  decode_ = load_decoder(shared_cache_ ? variant(kDecode) : kDecode);
}

std::unique_ptr<OrtGraph> OrtBackend::load(const std::string& name) const {
  return std::make_unique<OrtGraph>(env_, folder_, manifest_.graph(name), options_,
                                    weights_->packed());
}

std::unique_ptr<OrtGraph> OrtBackend::load_decoder(const std::string& name) const {
  const GraphInfo& info = manifest_.graph(name);
  Ort::SessionOptions own = options_.Clone();
  weights_->add_to(own, folder_ / info.file);
  // It would turn every referenced matrix into a copy, before they become FusedMatMul.
  if (manifest_.references && manifest_.dtype == "float32")
    own.AddConfigEntry("optimization.disable_specified_optimizers", "ConstantFolding");
  return std::make_unique<OrtGraph>(env_, folder_, info, own, weights_->packed());
}

const OrtGraph& OrtBackend::prefill_graph(bool padded) const {
  // The variant is causal and nothing else: right only where no row has padding.
  if (!padded || &prefill_->info() == &manifest_.graph(kPrefill)) return *prefill_;
  std::lock_guard<std::mutex> lock(creating_);
  if (!padded_prefill_) padded_prefill_ = load_decoder(kPrefill);
  return *padded_prefill_;
}

Ort::Value OrtBackend::encode(const std::vector<ModelInput>& inputs) const {
  std::vector<float> pixels;
  for (const ModelInput& input : inputs)
    pixels.insert(pixels.end(), input.pixels.begin(), input.pixels.end());
  Shape shape{static_cast<std::int64_t>(inputs.size()), 3, inputs[0].height, inputs[0].width};
  OrtGraph::Feeds feeds;
  feeds.emplace_back("pixel_values",
                     make_tensor(vision_->input_dtype("pixel_values"), shape, pixels));
  return std::move(vision_->run(feeds).at(0));
}

Ort::Value OrtBackend::embed(PromptBatch& batch, Ort::Value features) const {
  OrtGraph::Feeds feeds;
  feeds.emplace_back("input_ids", view(batch.ids, {batch.rows, batch.length}));
  feeds.emplace_back("image_features", std::move(features));
  return std::move(embed_->run(feeds).at(0));
}

std::unique_ptr<Sequence> OrtBackend::prefill(const std::vector<ModelInput>& inputs) const {
  Ort::Value features = encode(inputs);
  PromptBatch batch = batch_prompts(inputs, manifest_.image_token_id, manifest_.layout);
  bool padded = *std::max_element(batch.padding.begin(), batch.padding.end()) > 0;
  const OrtGraph& graph = prefill_graph(padded);
  Shape shape{batch.rows, batch.length};
  OrtGraph::Feeds feeds;
  feeds.emplace_back("inputs_embeds", embed(batch, std::move(features)));
  feeds.emplace_back("attention_mask", view(batch.mask, shape));
  feeds.emplace_back("position_ids", view(batch.positions, shape));
  std::vector<int> tiers = manifest_.layout.used_tiers();
  for (std::size_t i = 0; i < tiers.size(); ++i) {
    auto& rows = batch.ffn_rows[i];
    feeds.emplace_back(ffn_index_name(tiers[i]),
                       view(rows, {static_cast<std::int64_t>(rows.size())}));
  }
  feeds.emplace_back("kv_keep_index", view(batch.kv_keep, {batch.rows, batch.kept}));
  if (graph.info().has_input("image_index"))
    feeds.emplace_back("image_index", view(batch.image_index, shape));
  Prefilled prefilled{graph.run(feeds),
                      &graph.info().outputs,
                      {0, manifest_.visual_tokens, manifest_.hidden_size},
                      std::move(batch.padding)};
  return make_sequence(*embed_, *decode_, shared_cache_, std::move(prefilled));
}

}  // namespace skipvision
