#include "trt_engine.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "skipvision/skipvision.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "TensorRT 10.3 or newer is needed"
#endif

namespace skipvision {
namespace {

// The plugin that skipvision_export/tensorrt/plugin.py names.
constexpr char kLibrary[] = "libskipvision_kv_prune.so";
constexpr char kPlugin[] = "KVPrune";
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "skipvision";

/// (major * 100 + minor) * 100 + patch of "10.13.3", as TensorRT counts.
int version_number(const std::string& text) {
  int major = 0, minor = 0, patch = 0;
  std::sscanf(text.c_str(), "%d.%d.%d", &major, &minor, &patch);
  return (major * 100 + minor) * 100 + patch;
}

std::string library_version() {
  int number = getInferLibVersion();
  return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
         std::to_string(number % 100);
}

nvinfer1::Dims to_dims(const Sizes& sizes) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(sizes.size());
  if (sizes.size() > nvinfer1::Dims::MAX_DIMS) throw Error("a tensor has too many axes");
  std::copy(sizes.begin(), sizes.end(), dims.d);
  return dims;
}

/// Throws Error unless the file is a library of KVPrune in the version that engines are built for.
void check_plugin(const std::filesystem::path& file) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(file, ignored))
    throw Error(
        "the engines need the KVPrune plugin, and " + file.string() +
        " is no file; build it from plugins/kv_prune and give it as plugin, or put it there");
  std::unique_ptr<void, int (*)(void*)> library(
      dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL),
      [](void* open) { return open ? dlclose(open) : 0; });
  auto version =
      library
          ? reinterpret_cast<const char* (*)()>(dlsym(library.get(), "skipvision_kv_prune_version"))
          : nullptr;
  if (!version) throw Error(file.string() + " is no KVPrune plugin library");
  std::string found = version();
  found = found.substr(0, found.find(' '));
  if (found != kPluginVersion)
    throw Error(file.string() + " holds version " + found + " of KVPrune, expected " +
                kPluginVersion + "; build it again from the plugins/kv_prune of this release");
}

/// A file in memory for as long as this lives, without a copy of it.
struct Mapped {
  explicit Mapped(const std::filesystem::path& file) : bytes(std::filesystem::file_size(file)) {
    int descriptor = open(file.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor >= 0) begin = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (descriptor >= 0) close(descriptor);
    if (begin == MAP_FAILED) throw Error(file.string() + " cannot be read");
  }
  ~Mapped() { munmap(begin, bytes); }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  std::size_t bytes;
  void* begin = MAP_FAILED;
};

}  // namespace

std::size_t bytes_of(const std::string& dtype) {
  if (dtype == "half" || dtype == "bf16") return 2;
  if (dtype == "int64") return 8;
  if (dtype == "float" || dtype == "int32") return 4;
  if (dtype == "bool") return 1;
  throw Error("an engine's tensor has the type " + dtype + ", which this version does not know");
}

std::size_t count_of(const Sizes& sizes) {
  std::size_t count = 1;
  for (std::int64_t size : sizes) count *= static_cast<std::size_t>(size);
  return count;
}

void TrtLog::log(Severity severity, const nvinfer1::AsciiChar* message) noexcept {
  if (severity > Severity::kERROR) return;
  std::lock_guard lock(mutex_);
  last_ = message;
  last_ = last_.substr(0, last_.find('\n'));
}

std::string TrtLog::last() const {
  std::lock_guard lock(mutex_);
  return last_.empty() ? "TensorRT gives no reason" : last_;
}

TrtRuntime::TrtRuntime(const EnginesManifest& manifest, const std::filesystem::path& plugin) {
  check_version(manifest);
  runtime_.reset(nvinfer1::createInferRuntime(log_));
  if (!runtime_)
    throw Error("TensorRT " + library_version() + " cannot be started: " + log_.last());
  // An engine that newer versions run holds a runtime of its own: code, as trusted as the folder.
  if (manifest.version_compatible || manifest.holds_plugin)
    runtime_->setEngineHostCodeAllowed(true);
  if (manifest.has_plugin_layers() && !manifest.holds_plugin)
    load_plugin(plugin.empty() ? manifest.folder / kLibrary : plugin);
}

void TrtRuntime::check_version(const EnginesManifest& manifest) const {
  if (manifest.version_compatible) return;
  for (const auto& [graph, info] : manifest.engines)
    if (version_number(info.builder_version) != getInferLibVersion())
      throw Error((manifest.folder / info.file).string() + " was built with TensorRT " +
                  info.builder_version + ", this is TensorRT " + library_version() +
                  "; build again with it");
}

void TrtRuntime::load_plugin(const std::filesystem::path& file) {
  auto& registry = runtime_->getPluginRegistry();
  auto is_known = [&] {
    return registry.getCreator(kPlugin, kPluginVersion, kPluginNamespace) != nullptr;
  };
  if (is_known()) return;  // the program has registered it
  check_plugin(file);
  registry.loadLibrary(std::filesystem::absolute(file).c_str());
  if (!is_known())
    throw Error("TensorRT did not take KVPrune from " + file.string() + ": " + log_.last() +
                "; build it for this TensorRT's headers");
}

std::unique_ptr<nvinfer1::ICudaEngine> TrtRuntime::load(const std::filesystem::path& file) const {
  Mapped data(file);
  std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime_->deserializeCudaEngine(data.begin, data.bytes));
  if (!engine)
    throw Error(file.string() + " cannot be loaded by TensorRT " + library_version() + ": " +
                log_.last() + "; build it again on this GPU");
  return engine;
}

TrtEngine::TrtEngine(const TrtRuntime& runtime, const EnginesManifest& manifest,
                     const std::string& graph)
    : info(manifest.engine(graph)),
      log(runtime.log()),
      engine(runtime.load(manifest.folder / info.file)) {}

Execution::Execution(const TrtEngine& engine, const cuda::Buffer& scratch,
                     std::int64_t scratch_bytes)
    : engine_(engine),
      context_(engine.engine->createExecutionContext(
          nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED)) {
  accepted(context_ != nullptr, "gives no execution context");
  context_->setDeviceMemoryV2(scratch.data(), scratch_bytes);
}

void Execution::set_inputs(const std::vector<TrtInput>& inputs, cudaStream_t stream) {
  std::map<std::string, Sizes> all;
  for (const TrtInput& input : inputs) all[input.name] = input.sizes;
  int profile = info().choose_profile(all);
  if (profile != profile_)
    accepted(context_->setOptimizationProfileAsync(profile, stream), "refuses its profile");
  profile_ = profile;
  for (const TrtInput& input : inputs) {
    const char* name = input.name.c_str();
    accepted(context_->setInputShape(name, to_dims(input.sizes)),
             "refuses the shape of " + input.name);
    void* place = engine_.engine->isShapeInferenceIO(name) ? input.host : input.device;
    accepted(context_->setTensorAddress(name, place), "refuses the memory of " + input.name);
  }
  const char* missing = "";
  if (context_->inferShapes(1, &missing) != 0)
    accepted(false, std::string("cannot tell the shape of ") + missing);
}

Sizes Execution::output_sizes(const std::string& name) const {
  nvinfer1::Dims dims = context_->getTensorShape(name.c_str());
  accepted(dims.nbDims >= 0, "has no output " + name);
  Sizes sizes(dims.d, dims.d + dims.nbDims);
  for (std::int64_t size : sizes) accepted(size >= 0, "does not know the shape of " + name);
  return sizes;
}

Sizes Execution::set_output(const std::string& name, cuda::Buffer& buffer) {
  Sizes sizes = output_sizes(name);
  buffer.reserve(count_of(sizes) * bytes_of(info().dtype(name)));
  accepted(context_->setTensorAddress(name.c_str(), buffer.data()),
           "refuses the memory of " + name);
  return sizes;
}

void Execution::enqueue(cudaStream_t stream) { accepted(try_enqueue(stream), "does not run"); }

void Execution::accepted(bool took, const std::string& what) const {
  if (!took) throw Error(info().graph + ": the engine " + what + ": " + engine_.log.last());
}

}  // namespace skipvision
