// KVPrune as a TensorRT plugin (IPluginV3). The contract is in ../README.md.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

// 10.3 is what JetPack 6.2 has. Before 10.7 the ONNX parser takes a node's function body even where a plugin is
// loaded: `skipvision build` leaves the body out there.
static_assert(NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 3),
              "KVPrune needs the headers of TensorRT 10.3 or later");

namespace skipvision::tensorrt {

constexpr char kName[] = "KVPrune";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "skipvision";

// Written into an engine and compared when it is read, so that a library of another format is refused.
constexpr char kFormatField[] = "format_version";
constexpr int32_t kFormatVersion = 1;

// Report an error to TensorRT's logger, or to standard error where none was set.
void log_error(const std::string& reason);

// key_out[b, h, k] = key[b, h, keep_index[b, k]], and so for value. Holds no state: every shape comes with the call.
class KvPrunePlugin : public nvinfer1::IPluginV3,
                      public nvinfer1::IPluginV3OneCore,
                      public nvinfer1::IPluginV3OneBuild,
                      public nvinfer1::IPluginV3OneRuntime {
 public:
  KvPrunePlugin();
  KvPrunePlugin(const KvPrunePlugin&) = delete;
  KvPrunePlugin& operator=(const KvPrunePlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  // [B, H, K, Dh], K from the shape of keep_index.
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override;
  const char* getTimingCacheID() noexcept override { return kVersion; }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                  const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &fields_; }

 private:
  nvinfer1::PluginField format_;
  nvinfer1::PluginFieldCollection fields_;
};

// Makes plugins. While building, no field is needed and unknown ones are ignored (the ONNX parser may pass the node's
// attributes); from an engine the format version must be there and be this one.
class KvPruneCreator : public nvinfer1::IPluginCreatorV3One {
 public:
  // Null, with a logged reason, where the format version is missing or another.
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &no_fields_; }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  nvinfer1::PluginFieldCollection no_fields_{};
};

}  // namespace skipvision::tensorrt
