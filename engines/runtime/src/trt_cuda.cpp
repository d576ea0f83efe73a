#include "trt_cuda.h"

#include <string>
#include <utility>

#include "skipvision/skipvision.h"

namespace skipvision::cuda {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw Error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

void require_gpu() {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return;
  std::string reason = status == cudaSuccess ? "no device" : cudaGetErrorString(status);
  throw Error("no NVIDIA GPU here (" + reason +
              "): TensorRT's engines run on one; check it with nvidia-smi, or leave the engines "
              "out: the bundle runs in ONNX Runtime");
}

DeviceScope::DeviceScope(int device) : before_(current()) {
  if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
}

DeviceScope::~DeviceScope() { cudaSetDevice(before_); }

int DeviceScope::current() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

Stream::Stream() {
  // Work of other threads on the default stream must not be waited for.
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
}

Stream::~Stream() {
  // What is on it may still use memory that is freed next.
  cudaStreamSynchronize(stream_);
  cudaStreamDestroy(stream_);
}

void Stream::wait() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

Buffer::~Buffer() { release(); }

Buffer::Buffer(Buffer&& other) noexcept
    : place_(other.place_),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

void Buffer::reserve(std::size_t bytes) {
  if (data_ && bytes <= bytes_) return;
  std::size_t size = 256;
  while (size < bytes) size *= 2;
  release();
  void* data = nullptr;
  bool device = place_ == Place::kDevice;
  std::string what =
      (device ? "cudaMalloc of " : "cudaMallocHost of ") + std::to_string(size) + " bytes";
  check(device ? cudaMalloc(&data, size) : cudaMallocHost(&data, size), what.c_str());
  data_ = static_cast<std::byte*>(data);
  bytes_ = size;
}

void Buffer::release() noexcept {
  if (data_) place_ == Place::kDevice ? cudaFree(data_) : cudaFreeHost(data_);
  data_ = nullptr;
  bytes_ = 0;
}

void Graph::reset() noexcept {
  if (exec_) cudaGraphExecDestroy(exec_);
  if (graph_) cudaGraphDestroy(graph_);
  exec_ = nullptr;
  graph_ = nullptr;
}

void Graph::launch(cudaStream_t stream) const {
  check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch");
}

bool Graph::begin(cudaStream_t stream) {
  reset();
  // Of this thread only: others may allocate meanwhile.
  bool begun = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
  if (!begun) cudaGetLastError();
  return begun;
}

bool Graph::end(cudaStream_t stream) {
  bool ended = cudaStreamEndCapture(stream, &graph_) == cudaSuccess && graph_;
  if (!ended) cudaGetLastError();
  return ended;
}

bool Graph::instantiate() {
  bool made = cudaGraphInstantiateWithFlags(&exec_, graph_, 0) == cudaSuccess;
  if (!made) cudaGetLastError();
  return made;
}

}  // namespace skipvision::cuda
