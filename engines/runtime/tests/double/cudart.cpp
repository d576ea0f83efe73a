/// A stand-in for CUDA's runtime, for tests of the host's logic on a machine without a GPU: device
/// memory is the host's, and a stream keeps its work until somebody waits for it, as late as a real
/// one may. It shows nothing about CUDA.
///
/// CUDA_DOUBLE: words among "no-device" and "no-capture", what the stand-in refuses.
/// CUDA_DOUBLE_REPORT: a file for the counts of what was done, as JSON, at exit.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

using Work = std::function<void()>;

struct CUstream_st {
  std::vector<Work> queue;
  bool capturing = false;
  std::vector<Work> captured;
};
struct CUgraph_st {
  std::vector<Work> work;
};
struct CUgraphExec_st {
  std::vector<Work> work;
};

namespace {

struct Report {
  std::atomic<long> enqueued{0}, captures{0}, launches{0}, to_host_bytes{0}, allocations{0};
  ~Report() {
    const char* file = std::getenv("CUDA_DOUBLE_REPORT");
    std::FILE* stream = file ? std::fopen(file, "w") : nullptr;
    if (!stream) return;
    std::fprintf(
        stream,
        "{\"enqueued\": %ld, \"captures\": %ld, \"launches\": %ld, \"to_host_bytes\": %ld, "
        "\"allocations\": %ld}\n",
        enqueued.load(), captures.load(), launches.load(), to_host_bytes.load(),
        allocations.load());
    std::fclose(stream);
  }
} report;

bool refuses(const char* word) {
  const char* words = std::getenv("CUDA_DOUBLE");
  return words && std::strstr(words, word);
}

cudaError_t allocate(void** memory, std::size_t bytes) {
  ++report.allocations;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  // NaN in every type: what was never written must not be read.
  std::memset(*memory, 0xFF, bytes);
  return cudaSuccess;
}

}  // namespace

/// For the other stand-in. False where the stream captures.
bool cuda_double_enqueue(cudaStream_t stream, Work work) {
  ++report.enqueued;
  (stream->capturing ? stream->captured : stream->queue).push_back(std::move(work));
  return !stream->capturing;
}
bool cuda_double_captures(cudaStream_t stream) { return stream->capturing; }

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = refuses("no-device") ? 0 : 1;
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "an error";
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) { return allocate(memory, bytes); }
cudaError_t cudaMallocHost(void** memory, std::size_t bytes) { return allocate(memory, bytes); }
cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = new CUstream_st, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream->capturing) return cudaErrorStreamCaptureUnsupported;
  for (const Work& work : std::exchange(stream->queue, {})) work();
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from,
                              std::size_t from_pitch, std::size_t width, std::size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
  cuda_double_enqueue(stream, [=] {
    if (kind == cudaMemcpyDeviceToHost) report.to_host_bytes += static_cast<long>(width * height);
    for (std::size_t row = 0; row < height; ++row)
      std::memcpy(static_cast<char*>(to) + row * to_pitch,
                  static_cast<const char*>(from) + row * from_pitch, width);
  });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  cuda_double_enqueue(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->capturing = true;
  stream->captured.clear();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  stream->capturing = false;
  *graph = nullptr;
  if (refuses("no-capture")) return cudaErrorStreamCaptureInvalidated;
  ++report.captures;
  *graph = new CUgraph_st{stream->captured};
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                          unsigned long long) {
  return *exec = new CUgraphExec_st{graph->work}, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  ++report.launches;
  for (const Work& work : exec->work) cuda_double_enqueue(stream, work);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

}  // extern "C"
