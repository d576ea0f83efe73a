#include "trt_backend.h"

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <utility>

#include "batch.h"
#include "skipvision/skipvision.h"
#include "trt_sequence.h"

namespace skipvision {
namespace {

using Values = std::vector<std::int64_t>;

template <typename Half>
void narrow(const std::vector<float>& values, void* to) {
  std::transform(values.begin(), values.end(), static_cast<Half*>(to),
                 [](float value) { return Half(value); });
}

void write_pixels(const std::vector<float>& values, const std::string& dtype, void* to) {
  if (dtype == "half")
    narrow<Ort::Float16_t>(values, to);
  else if (dtype == "bf16")
    narrow<Ort::BFloat16_t>(values, to);
  else
    std::copy(values.begin(), values.end(), static_cast<float*>(to));
}

/// The pictures as tensors: one where they have as many crops each, else one for each.
std::vector<std::vector<float>> together(const std::vector<ModelInput>& inputs) {
  bool alike = std::all_of(inputs.begin(), inputs.end(),
                           [&](const ModelInput& input) { return input.crops == inputs[0].crops; });
  std::vector<std::vector<float>> all(alike ? 1 : inputs.size());
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    auto& to = all[alike ? 0 : i];
    to.insert(to.end(), inputs[i].pixels.begin(), inputs[i].pixels.end());
  }
  return all;
}

class TrtBackend : public Backend {
 public:
  TrtBackend(const Manifest& manifest, EnginesManifest engines, const BundleOptions& options)
      : manifest_(manifest),
        engines_manifest_(std::move(engines)),
        device_(cuda::DeviceScope::current()),
        runtime_(engines_manifest_, options.plugin),
        engines_(runtime_, engines_manifest_),
        cuda_graphs_(options.cuda_graphs) {
    lanes_.push_back(std::make_unique<Lane>(engines_));
  }

  std::unique_ptr<Sequence> prefill(const std::vector<ModelInput>& inputs) const override;

  std::size_t max_batch() const override {
    std::int64_t most = std::numeric_limits<std::int64_t>::max();
    for (auto [engine, input] :
         {std::pair(&engines_.vision, "pixel_values"), std::pair(&engines_.embed, "input_ids"),
          std::pair(&engines_.prefill, "inputs_embeds"),
          std::pair(&engines_.decode, "inputs_embeds")})
      most = std::min(most, engine->info.largest(input, 0));
    return static_cast<std::size_t>(std::max<std::int64_t>(most, 1));
  }

 private:
  LaneHold take_lane() const;
  void give_back(Lane* lane) const;
  /// Runs one graph on inputs, its only output to `buffer`; returns the output as an input of the
  /// next graph.
  static TrtInput run(Execution& graph, const std::vector<TrtInput>& inputs,
                      const std::string& output, cuda::Buffer& buffer, const Lane& lane);
  /// Features of all pictures, [pictures, V, D].
  static TrtInput encode(const std::vector<TrtInput>& pictures, Lane& lane);

  const Manifest& manifest_;
  EnginesManifest engines_manifest_;
  int device_;
  TrtRuntime runtime_;
  TrtEngines engines_;
  bool cuda_graphs_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Lane>> lanes_;  // nobody's at the moment
};

LaneHold TrtBackend::take_lane() const {
  std::lock_guard lock(mutex_);
  auto back = [this](Lane* lane) { give_back(lane); };
  // As many as there are sequences at once; creating one is no work for two threads.
  if (lanes_.empty()) return LaneHold(new Lane(engines_), back);
  LaneHold lane(lanes_.back().release(), back);
  lanes_.pop_back();
  return lane;
}

void TrtBackend::give_back(Lane* lane) const {
  std::unique_ptr<Lane> owned(lane);
  if (!owned->healthy) return;
  std::lock_guard lock(mutex_);
  lanes_.push_back(std::move(owned));
}

TrtInput TrtBackend::run(Execution& graph, const std::vector<TrtInput>& inputs,
                         const std::string& output, cuda::Buffer& buffer, const Lane& lane) {
  graph.set_inputs(inputs, lane.stream);
  Sizes sizes = graph.set_output(output, buffer);
  graph.enqueue(lane.stream);
  return {output, sizes, buffer.data(), nullptr};
}

TrtInput TrtBackend::encode(const std::vector<TrtInput>& pictures, Lane& lane) {
  constexpr char kFeatures[] = "image_features";
  if (pictures.size() == 1) return run(lane.vision, pictures, kFeatures, lane.features, lane);
  TrtInput all;
  for (std::size_t i = 0; i < pictures.size(); ++i) {
    all = run(lane.vision, {pictures[i]}, kFeatures, lane.picture, lane);
    std::size_t bytes = count_of(all.sizes) * bytes_of(lane.vision.info().dtype(kFeatures));
    lane.features.reserve(bytes * pictures.size());
    cuda::check(cudaMemcpyAsync(lane.features.data() + i * bytes, lane.picture.data(), bytes,
                                cudaMemcpyDeviceToDevice, lane.stream),
                "copy of the features");
  }
  all.sizes[0] = static_cast<std::int64_t>(pictures.size());
  all.device = lane.features.data();
  return all;
}

std::unique_ptr<Sequence> TrtBackend::prefill(const std::vector<ModelInput>& inputs) const {
  cuda::DeviceScope scope(device_);
  PromptBatch batch = batch_prompts(inputs, manifest_.image_token_id, manifest_.layout);
  std::vector<std::pair<TensorInfo, Sizes>> tensors;
  std::vector<const Values*> values;
  auto add = [&](const EngineInfo& info, const std::string& name, const Values& own, Sizes sizes) {
    tensors.push_back({info.integers(name), std::move(sizes)});
    values.push_back(&own);
  };
  const EngineInfo& prefill = engines_.prefill.info;
  Sizes shape{batch.rows, batch.length};
  add(engines_.embed.info, "input_ids", batch.ids, shape);
  add(prefill, "attention_mask", batch.mask, shape);
  add(prefill, "position_ids", batch.positions, shape);
  std::vector<int> tiers = manifest_.layout.used_tiers();
  for (std::size_t i = 0; i < tiers.size(); ++i)
    add(prefill, ffn_index_name(tiers[i]), batch.ffn_rows[i],
        {static_cast<std::int64_t>(batch.ffn_rows[i].size())});
  add(prefill, "kv_keep_index", batch.kv_keep, {batch.rows, batch.kept});
  if (manifest_.graph(kPrefill).has_input("image_index"))
    add(prefill, "image_index", batch.image_index, shape);
  const std::string& pixels = engines_.vision.info.dtype("pixel_values");
  std::vector<std::vector<float>> pictures = together(inputs);
  for (const auto& each : pictures) {
    const ModelInput& first = inputs[0];
    auto size = static_cast<std::int64_t>(each.size()) / (3 * first.height * first.width);
    auto count = static_cast<std::int64_t>(inputs.size() / pictures.size());
    Sizes sizes{count, 3, first.height, first.width};
    if (first.crops > 0) sizes.insert(sizes.begin() + 1, size / count);
    tensors.push_back({{"pixel_values", pixels}, sizes});
  }

  LaneHold hold = take_lane();
  Lane& lane = *hold;
  lane.healthy = false;  // until all of it has run
  std::vector<TrtInput> sent = lane.prompt.lay_out(tensors);
  for (std::size_t i = 0; i < values.size(); ++i)
    std::copy(values[i]->begin(), values[i]->end(), static_cast<std::int64_t*>(sent[i].host));
  auto first_picture = sent.begin() + static_cast<std::ptrdiff_t>(values.size());
  for (std::size_t i = 0; i < pictures.size(); ++i)
    write_pixels(pictures[i], pixels, sent[values.size() + i].host);
  lane.prompt.send(lane.stream);

  TrtInput features = encode({first_picture, sent.end()}, lane);
  std::vector<TrtInput> all(sent.begin() + 1, first_picture);
  all.push_back(run(lane.embed, {sent[0], features}, "inputs_embeds", lane.prompt_embeds, lane));
  lane.prefill.set_inputs(all, lane.stream);
  for (std::size_t i = 0; i < lane.cache.size(); ++i)
    lane.prefill.set_output(lane.cache[i].present, lane.present[i]);
  Sizes logits = lane.prefill.set_output("logits", lane.prompt_logits);
  lane.prefill.enqueue(lane.stream);
  return make_sequence({std::move(hold),
                        batch.kept,
                        std::move(batch.padding),
                        logits,
                        {0, manifest_.layout.total(), manifest_.hidden_size}},
                       cuda_graphs_);
}

}  // namespace

std::unique_ptr<Backend> make_trt_backend(const std::filesystem::path& folder,
                                          const Manifest& manifest, const BundleOptions& options) {
  EnginesManifest engines = EnginesManifest::load(options.engines, folder);
  engines.verify(false);
  cuda::require_gpu();  // before every byte of the engines is read
  engines.verify(options.verify_hashes);
  return std::make_unique<TrtBackend>(manifest, std::move(engines), options);
}

}  // namespace skipvision
