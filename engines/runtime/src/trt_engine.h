/// Engines in TensorRT.
#pragma once

#include <NvInferRuntime.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "trt_cuda.h"
#include "trt_manifest.h"

namespace skipvision {

/// Bytes of an element, by TensorRT's name of a type.
std::size_t bytes_of(const std::string& dtype);
std::size_t count_of(const Sizes& sizes);

/// Keeps what TensorRT said last of what went wrong; it may say it from any thread.
class TrtLog : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const nvinfer1::AsciiChar* message) noexcept override;
  /// One line.
  std::string last() const;

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

/// TensorRT's runtime, with the plugin that the engines need. Needs a GPU.
class TrtRuntime {
 public:
  /// plugin: the KVPrune library, empty for the one beside the engines. Throws Error for a TensorRT
  /// of another version than built the engines, and for a plugin that is missing or another one.
  TrtRuntime(const EnginesManifest& manifest, const std::filesystem::path& plugin);

  std::unique_ptr<nvinfer1::ICudaEngine> load(const std::filesystem::path& file) const;
  const TrtLog& log() const { return log_; }

 private:
  void check_version(const EnginesManifest& manifest) const;
  void load_plugin(const std::filesystem::path& file);

  TrtLog log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
};

/// An engine, which threads may share.
struct TrtEngine {
  TrtEngine(const TrtRuntime& runtime, const EnginesManifest& manifest, const std::string& graph);

  const EngineInfo& info;
  const TrtLog& log;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

/// An input: where it lies on the device, and on the host if it does.
struct TrtInput {
  std::string name;
  Sizes sizes;
  void* device = nullptr;
  void* host = nullptr;
};

/// One execution context of an engine, on scratch memory that it shares with those that never run
/// at the same time.
class Execution {
 public:
  Execution(const TrtEngine& engine, const cuda::Buffer& scratch, std::int64_t scratch_bytes);

  /// Sizes and places of all inputs; throws Error where no profile takes them.
  void set_inputs(const std::vector<TrtInput>& inputs, cudaStream_t stream);
  /// Of an output, for the inputs that are set.
  Sizes output_sizes(const std::string& name) const;
  /// Room for an output in `buffer`, and its place. Returns its sizes.
  Sizes set_output(const std::string& name, cuda::Buffer& buffer);

  /// False where TensorRT refuses.
  bool try_enqueue(cudaStream_t stream) { return context_->enqueueV3(stream); }
  void enqueue(cudaStream_t stream);
  const EngineInfo& info() const { return engine_.info; }
  const TrtLog& log() const { return engine_.log; }

 private:
  void accepted(bool took, const std::string& what) const;

  const TrtEngine& engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  int profile_ = 0;
};

}  // namespace skipvision
