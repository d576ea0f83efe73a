/// A stand-in for TensorRT's runtime, for tests of the host's logic on a machine without a GPU: an
/// "engine" is a JSON file that names an ONNX graph and its profiles, and the graph runs in ONNX
/// Runtime on what cudart.cpp calls device memory. It refuses what TensorRT's documentation says
/// that TensorRT refuses, or leaves undefined. It shows nothing about TensorRT itself.
///
/// stubs.h, which the test writes from TensorRT's headers, implements every virtual function of
/// theirs by a call of unexpected().
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

[[noreturn]] static void unexpected(const char* function) {
  std::fprintf(stderr, "the stand-in for TensorRT has no %s\n", function);
  std::abort();
}
#include "stubs.h"

bool cuda_double_enqueue(cudaStream_t stream, std::function<void()> work);
bool cuda_double_captures(cudaStream_t stream);

namespace {

using nvinfer1::Dims;
using Shape = std::vector<std::int64_t>;

constexpr std::int64_t kScratch = 4096;

/// An input or output: sizes, or names of sizes.
struct Tensor {
  Shape sizes;
  std::vector<std::string> names;
  ONNXTensorElementDataType type;
};

std::size_t bytes_of(const Tensor& tensor, const Shape& shape) {
  std::size_t bytes = tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64     ? 8
                      : tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2
                                                                             : 4;
  for (std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  return bytes;
}

/// What an engine holds, and its contexts share.
struct Graph {
  Graph(const nlohmann::json& engine, nvinfer1::ILogger& own_log)
      : log(own_log), profiles(engine["profiles"]) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    session = Ort::Session(env(), engine["onnx"].get<std::string>().c_str(), options);
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t i = 0; i < session.GetInputCount(); ++i)
      add(inputs, session.GetInputNameAllocated(i, allocator).get(), session.GetInputTypeInfo(i));
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i)
      add(outputs, session.GetOutputNameAllocated(i, allocator).get(),
          session.GetOutputTypeInfo(i));
  }

  static Ort::Env& env() {
    static Ort::Env own(ORT_LOGGING_LEVEL_ERROR, "double");
    return own;
  }
  static void add(std::map<std::string, Tensor>& to, const char* name, const Ort::TypeInfo& type) {
    auto info = type.GetTensorTypeAndShapeInfo();
    Tensor& tensor = to[name];
    tensor.sizes = info.GetShape();
    std::vector<const char*> names(tensor.sizes.size());
    info.GetSymbolicDimensions(names.data(), names.size());
    tensor.names.assign(names.begin(), names.end());
    tensor.type = info.GetElementType();
  }
  bool refuse(const std::string& why) const {
    log.log(nvinfer1::ILogger::Severity::kERROR, ("double: " + why).c_str());
    return false;
  }

  nvinfer1::ILogger& log;
  nlohmann::json profiles;
  Ort::Session session{nullptr};
  std::map<std::string, Tensor> inputs, outputs;
};

class Context : public nvinfer1::IExecutionContext, public nvinfer1::apiv::VExecutionContextStub {
 public:
  explicit Context(std::shared_ptr<Graph> graph) : graph_(std::move(graph)) { mImpl = this; }

  bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t stream) noexcept override {
    if (cuda_double_captures(stream)) return graph_->refuse("a profile is set in a capture");
    if (index < 0 || static_cast<std::size_t>(index) >= graph_->profiles.size())
      return graph_->refuse("no such profile");
    profile_ = static_cast<std::size_t>(index);
    shapes_.clear();
    return changed();
  }
  void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept override {
    scratch_ = size >= kScratch ? memory : nullptr;
  }
  bool setInputShape(const char* name, const Dims& dims) noexcept override {
    Shape shape(dims.d, dims.d + dims.nbDims);
    if (!graph_->inputs.count(name)) return graph_->refuse(std::string("no input ") + name);
    const auto& range = graph_->profiles[profile_][name];
    auto low = range[0].get<Shape>(), high = range[2].get<Shape>();
    bool fits = shape.size() == low.size();
    for (std::size_t i = 0; fits && i < shape.size(); ++i)
      fits = low[i] <= shape[i] && shape[i] <= high[i];
    if (!fits) return graph_->refuse(std::string(name) + " is outside of its profile");
    if (shapes_[name] == shape) return true;
    shapes_[name] = shape;
    return changed();
  }
  bool setTensorAddress(const char* name, void* memory) noexcept override {
    if (!memory || reinterpret_cast<std::uintptr_t>(memory) % 256)
      return graph_->refuse(std::string("address of ") + name);
    if (places_[name] == memory) return true;
    places_[name] = memory;
    return changed();
  }
  std::int32_t inferShapes(std::int32_t, const char** names) noexcept override {
    for (const auto& [name, tensor] : graph_->inputs)
      if (!shapes_.count(name)) return *names = name.c_str(), 1;
    return 0;
  }
  Dims getTensorShape(const char* name) const noexcept override {
    Dims dims{};
    auto found = graph_->outputs.find(name);
    if (found == graph_->outputs.end()) return dims.nbDims = -1, dims;
    Shape shape = shape_of(found->second, shapes_);
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (!scratch_) return graph_->refuse("no memory");
    if (cuda_double_captures(stream) && !settled_)
      return graph_->refuse("a capture before the first run with these shapes");
    settled_ = true;
    if (!apart()) return graph_->refuse("an output lies over another tensor");
    // A run has the shapes and places of now; a graph holds only as long as its context has them.
    bool captured = cuda_double_captures(stream);
    cuda_double_enqueue(stream, [=, shapes = shapes_, places = places_, version = version_] {
      if (captured && version != version_)
        unexpected("launch of a graph whose context has changed");
      run(shapes, places);
    });
    return true;
  }

 private:
  bool changed() {
    ++version_;
    settled_ = false;
    return true;
  }

  /// Sizes are known by the name that they have in an input.
  Shape shape_of(const Tensor& tensor, const std::map<std::string, Shape>& shapes) const {
    Shape shape = tensor.sizes;
    for (std::size_t i = 0; i < shape.size(); ++i)
      if (shape[i] < 0)
        for (const auto& [name, input] : graph_->inputs)
          for (std::size_t j = 0; j < input.names.size(); ++j)
            if (input.names[j] == tensor.names[i] && shapes.count(name))
              shape[i] = shapes.at(name)[j];
    return shape;
  }

  bool apart() const {
    std::vector<std::pair<const char*, std::size_t>> all;
    for (const auto& [name, tensor] : graph_->inputs) {
      if (!places_.count(name) || !shapes_.count(name)) return false;
      all.emplace_back(static_cast<const char*>(places_.at(name)),
                       bytes_of(tensor, shapes_.at(name)));
    }
    for (const auto& [name, tensor] : graph_->outputs) {
      if (!places_.count(name)) return false;
      auto* begin = static_cast<const char*>(places_.at(name));
      std::size_t bytes = bytes_of(tensor, shape_of(tensor, shapes_));
      for (const auto& [other, other_bytes] : all)
        if (begin < other + other_bytes && other < begin + bytes) return false;
      all.emplace_back(begin, bytes);
    }
    return true;
  }

  void run(const std::map<std::string, Shape>& shapes,
           const std::map<std::string, void*>& places) const {
    std::memset(scratch_, 0xFF, kScratch);
    auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
    std::vector<const char*> names, output_names;
    std::vector<Ort::Value> values, outputs;
    auto add = [&](const auto& tensors, auto& to_names, auto& to, auto shape_for) {
      for (const auto& [name, tensor] : tensors) {
        Shape shape = shape_for(name, tensor);
        to_names.push_back(name.c_str());
        to.push_back(Ort::Value::CreateTensor(memory, places.at(name), bytes_of(tensor, shape),
                                              shape.data(), shape.size(), tensor.type));
      }
    };
    add(graph_->inputs, names, values,
        [&](const std::string& name, const Tensor&) { return shapes.at(name); });
    add(graph_->outputs, output_names, outputs,
        [&](const std::string&, const Tensor& tensor) { return shape_of(tensor, shapes); });
    graph_->session.Run(Ort::RunOptions{nullptr}, names.data(), values.data(), values.size(),
                        output_names.data(), outputs.data(), outputs.size());
  }

  std::shared_ptr<Graph> graph_;
  std::size_t profile_ = 0;
  std::map<std::string, Shape> shapes_;
  std::map<std::string, void*> places_;
  void* scratch_ = nullptr;
  int version_ = 0;
  bool settled_ = false;
};

class Engine : public nvinfer1::ICudaEngine, public nvinfer1::apiv::VCudaEngineStub {
 public:
  explicit Engine(std::shared_ptr<Graph> graph) : graph_(std::move(graph)) { mImpl = this; }

  nvinfer1::IExecutionContext* createExecutionContext(
      nvinfer1::ExecutionContextAllocationStrategy) noexcept override {
    return new Context(graph_);
  }
  std::int64_t getDeviceMemorySizeV2() const noexcept override { return kScratch; }
  bool isShapeInferenceIO(const char*) const noexcept override { return false; }

 private:
  std::shared_ptr<Graph> graph_;
};

class Registry : public nvinfer1::IPluginRegistryStub {
 public:
  explicit Registry(nvinfer1::ILogger& log) : log_(log) {}

  nvinfer1::IPluginCreatorInterface* getCreator(const char*, const char*,
                                                const char*) noexcept override {
    return loaded_ ? reinterpret_cast<nvinfer1::IPluginCreatorInterface*>(this) : nullptr;
  }
  PluginLibraryHandle loadLibrary(const char* file) noexcept override {
    void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    loaded_ = library && dlsym(library, "getCreators");
    if (!loaded_) log_.log(nvinfer1::ILogger::Severity::kERROR, "double: no getCreators\nline 2");
    return library;
  }

 private:
  nvinfer1::ILogger& log_;
  bool loaded_ = false;
};

class Runtime : public nvinfer1::IRuntime, public nvinfer1::apiv::VRuntimeStub {
 public:
  explicit Runtime(nvinfer1::ILogger& log) : log_(log), registry_(log) { mImpl = this; }

  nvinfer1::ICudaEngine* deserializeCudaEngine(const void* blob,
                                               std::size_t size) noexcept override {
    auto* text = static_cast<const char*>(blob);
    auto engine = nlohmann::json::parse(text, text + size, nullptr, false);
    if (engine.is_object() && engine["plugin"] == true &&
        !registry_.getCreator("KVPrune", "1", "skipvision"))
      return log_.log(nvinfer1::ILogger::Severity::kERROR, "double: no plugin"), nullptr;
    if (engine.is_object()) return new Engine(std::make_shared<Graph>(engine, log_));
    log_.log(nvinfer1::ILogger::Severity::kERROR, "double: no engine\nline 2");
    return nullptr;
  }
  nvinfer1::IPluginRegistry& getPluginRegistry() noexcept override { return registry_; }
  void setEngineHostCodeAllowed(bool) noexcept override {}

 private:
  nvinfer1::ILogger& log_;
  Registry registry_;
};

}  // namespace

extern "C" {
void* createInferRuntime_INTERNAL(void* log, std::int32_t) noexcept {
  return static_cast<nvinfer1::IRuntime*>(new Runtime(*static_cast<nvinfer1::ILogger*>(log)));
}
std::int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
}
