// Drives the plugin through a build, an engine file and a run, as TensorRT does, with stand-ins for TensorRT and kernel.
//
//   plugin_test [--break]
//
// Exits 0, or 1 with the failures. --break gives the shape check a plugin that takes K from key's shape: it must exit 1.
#include "../tensorrt/kv_prune_plugin.h"

#include <cstdio>
#include <cstring>
#include <memory>

#include "plugin_doubles.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

extern "C" int skipvision_kv_prune(const skipvision_kv_prune_params* params, void* stream) {
  skipvision::test::launches.params.push_back(*params);
  skipvision::test::launches.streams.push_back(stream);
  return skipvision::test::launches.status;
}

extern "C" const char* skipvision_kv_prune_error(int status) { return status == -3 ? "overlap" : "other"; }

namespace {

using namespace nvinfer1;
using namespace skipvision::test;
using skipvision::tensorrt::KvPrunePlugin;

int failures = 0;
int checks = 0;
Logger logger;

void check(bool right, const char* what) {
  ++checks;
  if (right) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

// A refusal must come with exactly one line in the log that contains `part`.
void check_refused(bool refused, const char* part, const char* what) {
  check(refused, what);
  const bool said = logger.errors.size() == 1 && logger.errors[0].find(part) != std::string::npos &&
                    logger.errors[0].find('\n') == std::string::npos;
  check(said, (std::string(what) + ": logged reason").c_str());
  logger.errors.clear();
}

// The twin that the shape check must catch: K from key instead of keep_index.
class WrongLength final : public KvPrunePlugin {
  int32_t getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs*, int32_t, DimsExprs* outputs, int32_t,
                          IExprBuilder&) noexcept override {
    outputs[0] = inputs[0];
    outputs[1] = inputs[1];
    return 0;
  }
};

IPluginV3OneCore& core_of(IPluginV3& plugin) {
  return *static_cast<IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
}
IPluginV3OneBuild& build_of(IPluginV3& plugin) {
  return *static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime& runtime_of(IPluginV3& plugin) {
  return *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

IPluginCreatorV3One& creator() {
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  check(count == 1, "one creator");
  check(std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "kind of creator");
  return *static_cast<IPluginCreatorV3One*>(creators[0]);
}

using Plugin = std::unique_ptr<IPluginV3>;

Plugin make(TensorRTPhase phase = TensorRTPhase::kBUILD, const PluginFieldCollection* fields = nullptr) {
  return Plugin(creator().createPlugin("node", fields, phase));
}

void check_creator() {
  check(std::strcmp(creator().getPluginName(), "KVPrune") == 0, "name");
  check(std::strcmp(creator().getPluginVersion(), "1") == 0, "version");
  check(std::strcmp(creator().getPluginNamespace(), "skipvision") == 0, "namespace");
  check(creator().getFieldNames()->nbFields == 0, "no attributes");
  const PluginField extra[] = {{"plugin_namespace", "skipvision", PluginFieldType::kCHAR, 10},
                               {"plugin_version", "1", PluginFieldType::kCHAR, 1}};
  const PluginFieldCollection fields{2, extra};
  check(make(TensorRTPhase::kBUILD, &fields) != nullptr, "attributes of the node are ignored");
}

void check_core(IPluginV3& plugin) {
  check(std::strcmp(core_of(plugin).getPluginName(), "KVPrune") == 0, "plugin name");
  check(std::strcmp(core_of(plugin).getPluginVersion(), "1") == 0, "plugin version");
  check(std::strcmp(core_of(plugin).getPluginNamespace(), "skipvision") == 0, "plugin namespace");
  check(build_of(plugin).getNbOutputs() == 2, "two outputs");
  check(build_of(plugin).getTimingCacheID() != nullptr, "timing cache");
  check(build_of(plugin).getWorkspaceSize(nullptr, 0, nullptr, 0) == 0, "no workspace");
}

DimsExprs shape_of(std::initializer_list<const Length*> lengths) {
  DimsExprs shape{};
  for (const Length* length : lengths) shape.d[shape.nbDims++] = length;
  return shape;
}

// Also what the broken twin goes through.
void check_shapes(IPluginV3& plugin) {
  const Length b(-1), h(32), s(-1), size(128), k(-1);
  DimsExprs inputs[] = {shape_of({&b, &h, &s, &size}), shape_of({&b, &h, &s, &size}), shape_of({&b, &k})};
  DimsExprs outputs[2] = {};
  Builder builder;
  check(build_of(plugin).getOutputShapes(inputs, 3, nullptr, 0, outputs, 2, builder) == 0, "output shapes");
  for (const DimsExprs& output : outputs) {
    check(output.nbDims == 4, "rank of an output");
    check(output.d[0] == &b && output.d[1] == &h && output.d[3] == &size, "B, H and Dh of an output");
    check(output.d[2] == &k, "K of an output is keep_index's");
  }
  check(builder.operations == 0, "no arithmetic on lengths");
}

void check_wrong_shapes(IPluginV3& plugin) {
  const Length n(-1);
  const DimsExprs four = shape_of({&n, &n, &n, &n}), two = shape_of({&n, &n}), three = shape_of({&n, &n, &n});
  DimsExprs outputs[2] = {};
  Builder builder;
  const auto refused = [&](std::vector<DimsExprs> inputs, int32_t count = 2) {
    return build_of(plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, outputs,
                                            count, builder) != 0;
  };
  check_refused(refused({three, four, two}), "ranks 3, 4 and 2", "key of rank 3");
  check_refused(refused({four, three, two}), "ranks 4, 3 and 2", "value of rank 3");
  check_refused(refused({four, four, three}), "ranks 4, 4 and 3", "keep_index of rank 3");
  check_refused(refused({four, four}), "2 inputs", "no keep_index");
  check_refused(refused({four, four, two}, 1), "1 outputs", "one output");
}

void check_types(IPluginV3& plugin) {
  DataType outputs[2] = {};
  const auto status = [&](std::vector<DataType> inputs) {
    return build_of(plugin).getOutputDataTypes(outputs, 2, inputs.data(), static_cast<int32_t>(inputs.size()));
  };
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    check(status({type, type, DataType::kINT64}) == 0, "types of outputs");
    check(outputs[0] == type && outputs[1] == type, "outputs have the type of the inputs");
  }
  using T = DataType;
  check_refused(status({T::kINT8, T::kINT8, T::kINT64}) != 0, "key is", "int8");
  check_refused(status({T::kHALF, T::kBF16, T::kINT64}) != 0, "value is bfloat16", "two types");
  check_refused(status({T::kHALF, T::kHALF, T::kINT32}) != 0, "keep_index is int32", "int32 indices");
  check_refused(status({T::kHALF, T::kHALF}) != 0, "2 inputs", "types of two inputs");
}

using Tensors = std::vector<DynamicPluginTensorDesc>;

DynamicPluginTensorDesc tensor(DataType type, std::initializer_list<int64_t> lengths) {
  DynamicPluginTensorDesc result{};
  result.desc.type = type;
  result.desc.format = TensorFormat::kLINEAR;
  for (const int64_t length : lengths) result.desc.dims.d[result.desc.dims.nbDims++] = length;
  result.min = result.opt = result.max = result.desc.dims;
  return result;
}

// key, value, keep_index and the two outputs.
Tensors tensors(DataType type = DataType::kHALF) {
  return {tensor(type, {2, 4, 640, 128}), tensor(type, {2, 4, 640, 128}), tensor(DataType::kINT64, {2, 192}),
          tensor(type, {2, 4, 192, 128}), tensor(type, {2, 4, 192, 128})};
}

bool supported(IPluginV3& plugin, const Tensors& all, int32_t position) {
  return build_of(plugin).supportsFormatCombination(position, all.data(), 3, 2);
}

void check_formats(IPluginV3& plugin) {
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    for (int32_t position = 0; position < 5; ++position) {
      check(supported(plugin, tensors(type), position), "a supported combination");
      Tensors wrong = tensors(type);
      wrong[position].desc.format = TensorFormat::kCHW32;
      check(!supported(plugin, wrong, position), "another memory format");
      for (const DataType other : {DataType::kINT8, DataType::kINT32, DataType::kBOOL, DataType::kFP8}) {
        wrong = tensors(type);
        wrong[position].desc.type = other;
        check(!supported(plugin, wrong, position), "another type");
      }
    }
  }
  for (const int32_t position : {1, 3, 4}) {
    Tensors mixed = tensors(DataType::kHALF);
    mixed[position].desc.type = DataType::kBF16;
    check(!supported(plugin, mixed, position), "two types at once");
  }
  check(!supported(plugin, tensors(), 5) && !supported(plugin, tensors(), -1), "a position that is none");
  check(!build_of(plugin).supportsFormatCombination(0, tensors().data(), 2, 2), "formats of two inputs");
  check(logger.errors.empty(), "formats are refused in silence");
}

int32_t configure(IPluginV3& plugin, const Tensors& all, int32_t inputs = 3) {
  return build_of(plugin).configurePlugin(all.data(), inputs, all.data() + 3, 2);
}

int32_t change_shape(IPluginV3& plugin, const Tensors& all, int32_t inputs = 3) {
  std::vector<PluginTensorDesc> plain;
  for (const auto& each : all) plain.push_back(each.desc);
  return runtime_of(plugin).onShapeChange(plain.data(), inputs, plain.data() + 3, 2);
}

// A wrong description is refused while building and while running.
template <class Change>
void check_description(IPluginV3& plugin, const char* reason, const char* what, Change change) {
  Tensors all = tensors();
  change(all);
  check_refused(configure(plugin, all) != 0, reason, what);
  check_refused(change_shape(plugin, all) != 0, reason, what);
}

void check_descriptions(IPluginV3& plugin) {
  check(configure(plugin, tensors()) == 0, "configure");
  check(change_shape(plugin, tensors()) == 0, "shape change");
  Tensors dynamic = tensors();
  for (auto& each : dynamic) each.desc.dims.d[0] = -1;
  dynamic[0].desc.dims.d[2] = dynamic[2].desc.dims.d[1] = -1;
  check(configure(plugin, dynamic) == 0, "configure with unknown lengths");
  check(logger.errors.empty(), "nothing logged");
  check_description(plugin, "ranks 3", "rank of key", [](Tensors& all) { all[0].desc.dims.nbDims = 3; });
  check_description(plugin, "2 [B, K]", "rank of keep_index", [](Tensors& all) { all[2].desc.dims.nbDims = 1; });
  check_description(plugin, "same shape", "another S of value", [](Tensors& all) { all[1].desc.dims.d[2] = 5; });
  check_description(plugin, "same batch", "another B of keep_index", [](Tensors& all) { all[2].desc.dims.d[0] = 1; });
  check_description(plugin, "keeps more", "K above S", [](Tensors& all) { all[2].desc.dims.d[1] = 641; });
  check_description(plugin, "key is int32", "type of key",
                    [](Tensors& all) { all[0].desc.type = DataType::kINT32; });
  check_description(plugin, "keep_index is float32", "type of keep_index",
                    [](Tensors& all) { all[2].desc.type = DataType::kFLOAT; });
  Tensors output = tensors();
  output[4].desc.type = DataType::kFLOAT;
  check_refused(configure(plugin, output) != 0, "value is float32", "type of an output");
  check_refused(configure(plugin, tensors(), 2) != 0, "2 inputs", "configure with two inputs");
  check_refused(change_shape(plugin, tensors(), 2) != 0, "2 inputs", "shape change with two inputs");
}

void check_launch(IPluginV3& plugin, DataType type, int64_t element) {
  char memory[5];
  const void* inputs[] = {memory, memory + 1, memory + 2};
  void* outputs[] = {memory + 3, memory + 4};
  std::vector<PluginTensorDesc> plain;
  for (const auto& each : tensors(type)) plain.push_back(each.desc);
  const auto stream = reinterpret_cast<cudaStream_t>(memory);
  launches = {};
  check(runtime_of(plugin).enqueue(plain.data(), plain.data() + 3, inputs, outputs, nullptr, stream) == 0, "enqueue");
  check(launches.params.size() == 1 && launches.streams[0] == stream, "one launch on the stream");
  const skipvision_kv_prune_params& p = launches.params.at(0);
  check(p.struct_bytes == sizeof(p) && p.batch == 2 && p.heads == 4 && p.sequence == 640 && p.kept == 192, "sizes");
  check(p.element_bytes == element && p.row_bytes == 128 * element && p.output_head_rows == 192, "rows");
  check(p.key == memory && p.value == memory + 1 && static_cast<const void*>(p.keep_index) == memory + 2, "inputs");
  check(p.key_out == memory + 3 && p.value_out == memory + 4, "outputs");
  launches.status = -3;
  check_refused(runtime_of(plugin).enqueue(plain.data(), plain.data() + 3, inputs, outputs, nullptr, stream) != 0,
                "overlap", "a failed launch");
}

// What the engine file holds, copied as TensorRT copies it, makes the plugin again.
void check_serialization(IPluginV3& plugin) {
  const PluginFieldCollection* fields = runtime_of(plugin).getFieldsToSerialize();
  check(fields->nbFields == 1, "one field");
  const PluginField& field = fields->fields[0];
  check(std::strcmp(field.name, "format_version") == 0 && field.type == PluginFieldType::kINT32, "format version");
  int32_t version = 0;
  std::memcpy(&version, field.data, sizeof(version));
  PluginField copied("format_version", &version, PluginFieldType::kINT32, 1);
  const PluginFieldCollection engine{1, &copied};
  Plugin again = make(TensorRTPhase::kRUNTIME, &engine);
  check(again != nullptr, "recreated");
  if (again) check_launch(*again, DataType::kHALF, 2);
  ++version;
  check_refused(make(TensorRTPhase::kRUNTIME, &engine) == nullptr, "format is 2", "an engine of another format");
  check_refused(make(TensorRTPhase::kBUILD, &engine) == nullptr, "format is 2", "another format while building");
  copied.type = PluginFieldType::kFLOAT32;
  check_refused(make(TensorRTPhase::kRUNTIME, &engine) == nullptr, "not one int32", "a format of another type");
  const PluginFieldCollection none{};
  check_refused(make(TensorRTPhase::kRUNTIME, &none) == nullptr, "no format version", "an engine without a format");
  check_refused(make(TensorRTPhase::kRUNTIME) == nullptr, "no format version", "an engine without fields");
}

void check_copies() {
  Plugin first = make();
  Plugin second(first->clone());
  Plugin third(runtime_of(*second).attachToContext(nullptr));
  check(second != nullptr && second != first && third != nullptr && third != second, "copies are new objects");
  first.reset();
  second.reset();
  check_core(*third);
  check_shapes(*third);
  check_serialization(*third);
}

}  // namespace

int main(int count, char** arguments) {
  setLoggerFinder(&logger);
  if (count == 2 && std::strcmp(arguments[1], "--break") == 0) {
    WrongLength twin;
    check_shapes(twin);
  } else {
    check_creator();
    Plugin plugin = make();
    check_core(*plugin);
    check_types(*plugin);
    check_shapes(*plugin);
    check_wrong_shapes(*plugin);
    check_formats(*plugin);
    check_descriptions(*plugin);
    check_launch(*plugin, DataType::kFLOAT, 4);
    check_launch(*plugin, DataType::kBF16, 2);
    check_serialization(*plugin);
    check_copies();
  }
  setLoggerFinder(nullptr);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
