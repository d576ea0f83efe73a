#include "ort_backend.h"

#include <algorithm>

#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

/// The manifest's name of a graph's variant for this runtime.
std::string variant(const std::string& graph) { return graph + ".onnxruntime"; }

}  // namespace

OrtBackend::OrtBackend(const std::filesystem::path& folder, const Manifest& manifest,
                       const OrtOptions& options)
    : folder_(folder),
      manifest_(manifest),
      share_weights_(options.share_weights),
      env_(nullptr),
      options_(nullptr),
      decode_name_(has(variant(kDecode)) ? variant(kDecode) : kDecode) {
  check_onnxruntime();
  env_ = Ort::Env(ORT_LOGGING_LEVEL_ERROR, "skipvision");
  options_ = Ort::SessionOptions();
  options_.SetIntraOpNumThreads(options.threads);
  options_.SetGraphOptimizationLevel(ORT_ENABLE_ALL);
  weights_ = std::make_unique<SharedWeights>();
  if (!options.create_now) return;
  for (const std::string& name :
       {std::string(kVision), std::string(kEmbed), prefill_name(false), decode_name_})
    graph(name);
}

std::string OrtBackend::prefill_name(bool padded) const {
  // The variant is causal and nothing else: right only where no row has padding.
  return !padded && has(variant(kPrefill)) ? variant(kPrefill) : kPrefill;
}

const OrtGraph& OrtBackend::graph(const std::string& name) const {
  std::lock_guard<std::mutex> lock(creating_);
  std::unique_ptr<OrtGraph>& own = graphs_[name];
  if (!own) own = load(name);
  return *own;
}

std::unique_ptr<OrtGraph> OrtBackend::load(const std::string& name) const {
  const GraphInfo& info = manifest_.graph(name);
  Ort::SessionOptions own = options_.Clone();
  bool decoder = name != kVision && name != kEmbed;
  if (decoder && share_weights_) weights_->add_to(own, folder_ / info.file);
  // It would turn every referenced matrix into a copy, before they become FusedMatMul.
  if (decoder && manifest_.references && manifest_.dtype == "float32")
    own.AddConfigEntry("optimization.disable_specified_optimizers", "ConstantFolding");
  return std::make_unique<OrtGraph>(env_, folder_, info, own,
                                    share_weights_ ? weights_->packed() : nullptr);
}

Ort::Value OrtBackend::encode(const std::vector<ModelInput>& inputs) const {
  std::vector<float> pixels;
  for (const ModelInput& input : inputs)
    pixels.insert(pixels.end(), input.pixels.begin(), input.pixels.end());
  const OrtGraph& vision = graph(kVision);
  const ModelInput& first = inputs[0];
  Shape shape{static_cast<std::int64_t>(inputs.size()), 3, first.height, first.width};
  if (first.crops > 0) shape.insert(shape.begin() + 1, first.crops);
  OrtGraph::Feeds feeds;
  feeds.emplace_back("pixel_values",
                     make_tensor(vision.input_dtype("pixel_values"), shape, pixels));
  return std::move(vision.run(feeds).at(0));
}

Ort::Value OrtBackend::encode_all(const std::vector<ModelInput>& inputs) const {
  auto alike = [&](const ModelInput& input) { return input.crops == inputs[0].crops; };
  if (std::all_of(inputs.begin(), inputs.end(), alike)) return encode(inputs);
  std::vector<float> values, all;
  Shape shape;
  for (const ModelInput& input : inputs) {
    Ort::Value features = encode({input});
    shape = shape_of(features);
    read_floats(features, values);
    all.insert(all.end(), values.begin(), values.end());
  }
  shape[0] = static_cast<std::int64_t>(inputs.size());
  return make_tensor(graph(kEmbed).input_dtype("image_features"), shape, all);
}

Ort::Value OrtBackend::embed(PromptBatch& batch, Ort::Value features) const {
  OrtGraph::Feeds feeds;
  feeds.emplace_back("input_ids", view(batch.ids, {batch.rows, batch.length}));
  feeds.emplace_back("image_features", std::move(features));
  return std::move(graph(kEmbed).run(feeds).at(0));
}

Prefilled OrtBackend::run_prefill(const std::vector<ModelInput>& inputs) const {
  Ort::Value features = encode_all(inputs);
  PromptBatch batch = batch_prompts(inputs, manifest_.image_token_id, manifest_.layout);
  bool padded = *std::max_element(batch.padding.begin(), batch.padding.end()) > 0;
  const OrtGraph& prefill = graph(prefill_name(padded));
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
  if (prefill.info().has_input("image_index"))
    feeds.emplace_back("image_index", view(batch.image_index, shape));
  return {prefill.run(feeds),
          &prefill.info().outputs,
          {0, manifest_.visual_tokens, manifest_.hidden_size},
          std::move(batch.padding)};
}

std::unique_ptr<Sequence> OrtBackend::prefill(const std::vector<ModelInput>& inputs) const {
  Prefilled prefilled = run_prefill(inputs);
  bool shared = decode_name_ != kDecode;
  return make_sequence(graph(kEmbed), graph(decode_name_), shared, std::move(prefilled));
}

}  // namespace skipvision
