#include "kv_prune_plugin.h"

#include <cstring>
#include <new>

#include "../kernel/kv_prune.h"
#include "kv_prune_checks.h"

namespace skipvision::tensorrt {

using namespace nvinfer1;

namespace {

constexpr int32_t kDone = 0;
constexpr int32_t kRefused = -1;

// Log a reason, where there is one, as TensorRT's return code.
int32_t verdict(const std::string& reason) {
  if (reason.empty()) return kDone;
  log_error(reason);
  return kRefused;
}

// Describe a launch: sizes from the inputs, a packed output.
skipvision_kv_prune_params params_of(const PluginTensorDesc* in, const void* const* inputs, void* const* outputs) {
  const Dims& key = in[0].dims;
  const int64_t element = element_bytes(in[0].type);
  skipvision_kv_prune_params params{};
  params.struct_bytes = sizeof(params);
  params.batch = key.d[0];
  params.heads = key.d[1];
  params.sequence = key.d[2];
  params.kept = in[2].dims.d[1];
  params.row_bytes = key.d[3] * element;
  params.element_bytes = element;
  params.output_head_rows = params.kept;
  params.key = inputs[0];
  params.value = inputs[1];
  params.keep_index = static_cast<const int64_t*>(inputs[2]);
  params.key_out = outputs[0];
  params.value_out = outputs[1];
  return params;
}

// The format version among the fields, or null.
const PluginField* find_format(const PluginFieldCollection* fields) {
  const int32_t count = fields == nullptr ? 0 : fields->nbFields;
  for (int32_t i = 0; i < count; ++i) {
    const PluginField& field = fields->fields[i];
    if (field.name != nullptr && std::strcmp(field.name, kFormatField) == 0) return &field;
  }
  return nullptr;
}

std::string check_format(const PluginField* field, TensorRTPhase phase) {
  const std::string expected = "; this library reads format " + std::to_string(kFormatVersion) +
                               ": load the library that the engine was built with, or build the engine again";
  if (field == nullptr) {
    return phase == TensorRTPhase::kRUNTIME ? "the engine's plugin holds no format version" + expected : "";
  }
  if (field->type != PluginFieldType::kINT32 || field->length != 1 || field->data == nullptr) {
    return "format_version is not one int32" + expected;
  }
  int32_t version = 0;
  std::memcpy(&version, field->data, sizeof(version));
  return version == kFormatVersion ? "" : "the plugin's format is " + std::to_string(version) + expected;
}

}  // namespace

KvPrunePlugin::KvPrunePlugin()
    : format_(kFormatField, &kFormatVersion, PluginFieldType::kINT32, 1), fields_{1, &format_} {}

IPluginCapability* KvPrunePlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE:
      return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD:
      return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME:
      return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* KvPrunePlugin::clone() noexcept { return new (std::nothrow) KvPrunePlugin(); }

int32_t KvPrunePlugin::getNbOutputs() const noexcept { return kOutputs; }

int32_t KvPrunePlugin::getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                                          int32_t input_count) const noexcept {
  std::string reason = check_counts(input_count, output_count);
  if (reason.empty()) reason = check_types(inputs[0], inputs[1], inputs[2]);
  if (reason.empty()) outputs[0] = outputs[1] = inputs[0];
  return verdict(reason);
}

int32_t KvPrunePlugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                                       DimsExprs* outputs, int32_t output_count, IExprBuilder&) noexcept {
  std::string reason = check_counts(input_count, output_count);
  if (reason.empty()) reason = check_ranks(inputs[0].nbDims, inputs[1].nbDims, inputs[2].nbDims);
  for (int32_t i = 0; i < kOutputs && reason.empty(); ++i) {
    outputs[i] = inputs[i];
    outputs[i].d[2] = inputs[2].d[1];
  }
  return verdict(reason);
}

bool KvPrunePlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                              int32_t input_count, int32_t output_count) noexcept {
  // Called for every combination, so a refusal is no error and nothing is logged. Later positions are not set yet.
  if (input_count != kInputs || output_count != kOutputs) return false;
  if (position < 0 || position >= kInputs + kOutputs) return false;
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != TensorFormat::kLINEAR) return false;
  if (position == 0) return element_bytes(tensor.type) != 0;
  return tensor.type == (position == 2 ? DataType::kINT64 : tensors[0].desc.type);
}

int32_t KvPrunePlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                       const DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept {
  std::string reason = check_counts(input_count, output_count);
  if (reason.empty()) reason = check_types(inputs[0].desc.type, inputs[1].desc.type, inputs[2].desc.type);
  if (reason.empty()) reason = check_types(outputs[0].desc.type, outputs[1].desc.type, inputs[2].desc.type);
  if (reason.empty()) reason = check_dims(inputs[0].desc.dims, inputs[1].desc.dims, inputs[2].desc.dims);
  return verdict(reason);
}

int32_t KvPrunePlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                                     int32_t output_count) noexcept {
  std::string reason = check_counts(input_count, output_count);
  if (reason.empty()) reason = check_types(inputs[0].type, inputs[1].type, inputs[2].type);
  if (reason.empty()) reason = check_dims(inputs[0].dims, inputs[1].dims, inputs[2].dims);
  return verdict(reason);
}

int32_t KvPrunePlugin::enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc*,
                               const void* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept {
  const skipvision_kv_prune_params params = params_of(input_descriptions, inputs, outputs);
  const int status = skipvision_kv_prune(&params, stream);
  return verdict(status == SKIPVISION_KV_PRUNE_OK ? "" : std::string("launch: ") + skipvision_kv_prune_error(status));
}

IPluginV3* KvPrunePlugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

IPluginV3* KvPruneCreator::createPlugin(const char*, const PluginFieldCollection* fields,
                                        TensorRTPhase phase) noexcept {
  const std::string reason = check_format(find_format(fields), phase);
  return verdict(reason) == kDone ? new (std::nothrow) KvPrunePlugin() : nullptr;
}

}  // namespace skipvision::tensorrt
