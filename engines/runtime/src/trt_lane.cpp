#include "trt_lane.h"

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstring>

#include "skipvision/skipvision.h"

namespace skipvision {
namespace {

// What TensorRT asks of an address.
constexpr std::size_t kAlignment = 256;

template <typename Half>
void widen(const std::byte* data, std::vector<float>& values) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    Half half;
    std::memcpy(&half, data + i * sizeof(half), sizeof(half));
    values[i] = half.ToFloat();
  }
}

std::vector<CacheNames> cache_names(const EngineInfo& prefill, const EngineInfo& decode) {
  std::vector<CacheNames> names;
  for (const TensorInfo& output : prefill.outputs) {
    if (output.name.rfind(kPresent, 0) != 0) continue;
    std::string past = past_name(output.name);
    if (decode.largest(past, 3) == 0)
      throw Error(decode.graph + ": the engine takes no " + past + " of four axes; build again");
    names.push_back({past, output.name});
  }
  if (names.empty()) throw Error(prefill.graph + ": the engine gives no K/V; build again");
  return names;
}

}  // namespace

TrtEngines::TrtEngines(const TrtRuntime& runtime, const EnginesManifest& manifest)
    : vision(runtime, manifest, kVision),
      embed(runtime, manifest, kEmbed),
      prefill(runtime, manifest, kPrefill),
      decode(runtime, manifest, kDecode) {}

std::int64_t TrtEngines::scratch_bytes() const {
  std::int64_t most = 0;
  for (const TrtEngine* each : {&vision, &embed, &prefill, &decode})
    most = std::max<std::int64_t>(most, each->engine->getDeviceMemorySizeV2());
  return most;
}

std::vector<TrtInput> Upload::lay_out(const std::vector<std::pair<TensorInfo, Sizes>>& inputs) {
  std::vector<std::size_t> places;
  bytes_ = 0;
  for (const auto& [tensor, sizes] : inputs) {
    places.push_back(bytes_);
    std::size_t bytes = std::max<std::size_t>(1, count_of(sizes) * bytes_of(tensor.dtype));
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  host_.reserve(bytes_);
  device_.reserve(bytes_);
  std::vector<TrtInput> result;
  for (std::size_t i = 0; i < inputs.size(); ++i)
    result.push_back({inputs[i].first.name, inputs[i].second, device_.data() + places[i],
                      host_.data() + places[i]});
  return result;
}

void Upload::send(cudaStream_t stream) const {
  cuda::check(cudaMemcpyAsync(device_.data(), host_.data(), bytes_, cudaMemcpyHostToDevice, stream),
              "copy of the inputs");
}

void Download::fetch(const cuda::Buffer& logits, const Sizes& sizes, const std::string& dtype,
                     cudaStream_t stream) {
  if (sizes.size() != 3 || count_of(sizes) == 0)
    throw Error("an engine's logits are not [batch, positions, vocab]; build again");
  dtype_ = dtype;
  vocabulary_ = static_cast<std::size_t>(sizes[2]);
  auto rows = static_cast<std::size_t>(sizes[0]), positions = static_cast<std::size_t>(sizes[1]);
  std::size_t bytes = vocabulary_ * bytes_of(dtype);
  host_.reserve(rows * bytes);
  cuda::check(cudaMemcpy2DAsync(host_.data(), bytes, logits.data() + (positions - 1) * bytes,
                                positions * bytes, bytes, rows, cudaMemcpyDeviceToHost, stream),
              "copy of the logits");
}

Logits Download::read(std::size_t row, std::vector<float>& values) const {
  const std::byte* data = host_.data() + row * vocabulary_ * bytes_of(dtype_);
  if (dtype_ == "float") return {reinterpret_cast<const float*>(data), vocabulary_};
  values.resize(vocabulary_);
  if (dtype_ == "half")
    widen<Ort::Float16_t>(data, values);
  else
    widen<Ort::BFloat16_t>(data, values);
  return values;
}

Lane::Lane(const TrtEngines& engines)
    : scratch([&] {
        cuda::Buffer buffer;
        buffer.reserve(static_cast<std::size_t>(engines.scratch_bytes()));
        return buffer;
      }()),
      vision(engines.vision, scratch, engines.scratch_bytes()),
      embed(engines.embed, scratch, engines.scratch_bytes()),
      prefill(engines.prefill, scratch, engines.scratch_bytes()),
      embed_token(engines.embed, scratch, engines.scratch_bytes()),
      decode(engines.decode, scratch, engines.scratch_bytes()),
      cache(cache_names(engines.prefill.info, engines.decode.info)),
      past(cache.size()),
      present(cache.size()) {}

}  // namespace skipvision
