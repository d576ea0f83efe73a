/// CUDA's objects with owners.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace skipvision::cuda {

/// Throws Error, "CUDA: WHAT: REASON", unless `status` is success.
void check(cudaError_t status, const char* what);

/// Throws Error where there is no GPU; must come before TensorRT is touched, which crashes then.
void require_gpu();

/// Makes a device the calling thread's own, and gives the thread its old one back.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  /// The calling thread's.
  static int current();

 private:
  int before_;
};

class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  operator cudaStream_t() const { return stream_; }
  /// Until all of its work is done.
  void wait() const;

 private:
  cudaStream_t stream_ = nullptr;
};

/// Memory of the device, or pinned memory of the host, at least 256 bytes.
class Buffer {
 public:
  enum class Place { kDevice, kHost };

  explicit Buffer(Place place = Place::kDevice) : place_(place) {}
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&&) = delete;

  /// Room for `bytes`: the next power of two, so that what grows rarely moves. Growing loses the
  /// content; no work that uses it may be under way.
  void reserve(std::size_t bytes);
  std::byte* data() const { return data_; }

 private:
  void release() noexcept;

  Place place_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// An instantiated graph; false where there is none.
class Graph {
 public:
  Graph() = default;
  ~Graph() { reset(); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  explicit operator bool() const { return exec_ != nullptr; }
  void reset() noexcept;
  void launch(cudaStream_t stream) const;

  /// Records what `launch` puts on the stream, without running it. False, and no error left behind,
  /// where that cannot be captured.
  template <typename Launch>
  bool capture(cudaStream_t stream, const Launch& launch) {
    if (!begin(stream)) return false;
    bool launched = launch();
    return end(stream) && launched && instantiate();
  }

 private:
  bool begin(cudaStream_t stream);
  bool end(cudaStream_t stream);
  bool instantiate();

  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace skipvision::cuda
