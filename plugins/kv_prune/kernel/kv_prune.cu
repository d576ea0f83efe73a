// The KVPrune kernel and its launcher. What a thread copies is in kv_prune_index.h.
#include <cuda_runtime.h>

#include "kv_prune.h"
#include "kv_prune_index.h"
#include "kv_prune_plan.h"

#ifndef SKIPVISION_PACKAGE_VERSION
#define SKIPVISION_PACKAGE_VERSION "unknown"
#endif

#define SKIPVISION_EXPORT __attribute__((visibility("default")))

namespace skipvision {
namespace {

template <class Unit>
struct Tensor {
  const Unit* input;
  Unit* output;
};

// Copy one tile; in place all of a block's loads come before its first store.
template <Mode mode, class Unit>
struct CopyTile {
  const Plan& plan;
  const int64_t* keep_index;
  Tensor<Unit> tensor;

  __device__ void operator()(const Tile& tile) const {
    Unit held[kItems];
    load<mode>(plan, tile, keep_index, tensor.input, threadIdx.x, held);
    if (mode != Mode::kOutOfPlace) __syncthreads();
    store<mode>(plan, tile, tensor.output, threadIdx.x, held);
  }
};

// blockIdx.z is 0 for key and 1 for value. No __restrict__: in place input and output are the same memory.
template <Mode mode, class Unit>
__global__ void __launch_bounds__(threads_of(mode))
    prune(const Plan plan, const int64_t* keep_index, const Tensor<Unit> key, const Tensor<Unit> value) {
  const CopyTile<mode, Unit> copy{plan, keep_index, blockIdx.z == 0 ? key : value};
  walk<mode>(plan, blockIdx.x, blockIdx.y, gridDim.x, gridDim.y, copy);
}

template <class Unit>
Tensor<Unit> tensor_of(const void* input, void* output) {
  return {static_cast<const Unit*>(input), static_cast<Unit*>(output)};
}

template <Mode mode, class Unit>
int start(const Launch& launch, const skipvision_kv_prune_params& params, cudaStream_t stream) {
  const Grid grid = grid_of<mode>(launch.plan);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 2);
  prune<mode, Unit><<<blocks, threads_of(mode), 0, stream>>>(launch.plan, params.keep_index,
                                                             tensor_of<Unit>(params.key, params.key_out),
                                                             tensor_of<Unit>(params.value, params.value_out));
  return static_cast<int>(cudaGetLastError());
}

template <class Unit>
int start(const Launch& launch, const skipvision_kv_prune_params& params, cudaStream_t stream) {
  switch (launch.mode) {
    case Mode::kInPlaceView:
      return start<Mode::kInPlaceView, Unit>(launch, params, stream);
    case Mode::kInPlacePacked:
      return start<Mode::kInPlacePacked, Unit>(launch, params, stream);
    default:
      return start<Mode::kOutOfPlace, Unit>(launch, params, stream);
  }
}

int start(const Launch& launch, const skipvision_kv_prune_params& params, cudaStream_t stream) {
  switch (launch.unit_bytes) {
    case 16:
      return start<uint4>(launch, params, stream);
    case 8:
      return start<uint2>(launch, params, stream);
    case 4:
      return start<uint32_t>(launch, params, stream);
    default:
      return start<uint16_t>(launch, params, stream);
  }
}

}  // namespace
}  // namespace skipvision

extern "C" SKIPVISION_EXPORT int skipvision_kv_prune(const skipvision_kv_prune_params* params, void* stream) {
  if (params == nullptr) return SKIPVISION_KV_PRUNE_BAD_ARGUMENT;
  skipvision::Launch launch;
  const int status = skipvision::prepare(*params, launch);
  if (status != SKIPVISION_KV_PRUNE_OK || launch.nothing) return status;
  return skipvision::start(launch, *params, static_cast<cudaStream_t>(stream));
}

extern "C" SKIPVISION_EXPORT const char* skipvision_kv_prune_error(int status) {
  switch (status) {
    case SKIPVISION_KV_PRUNE_OK:
      return "no error";
    case SKIPVISION_KV_PRUNE_BAD_ARGUMENT:
      return "a size, stride or struct_bytes is out of its range, or a pointer is null";
    case SKIPVISION_KV_PRUNE_MISALIGNED:
      return "a pointer is not a multiple of its element's size";
    case SKIPVISION_KV_PRUNE_OVERLAP:
      return "an output overlaps other memory, and not as an in-place view (output_head_rows == sequence) or packed "
             "(output_head_rows == kept) tensor";
    case SKIPVISION_KV_PRUNE_TOO_LARGE:
      return "a tensor has 2^63 bytes or more, or a row 2^31 or more";
    default:
      return status > 0 ? cudaGetErrorString(static_cast<cudaError_t>(status)) : "unknown status";
  }
}

extern "C" SKIPVISION_EXPORT const char* skipvision_kv_prune_version(void) {
  return "1 (skipvision-export " SKIPVISION_PACKAGE_VERSION ")";
}
