// What csrc/cuda.cu uses of CUDA, as plain C++: kernels run thread after thread on the host, so that tests and
// sanitizers reach them without a GPU. Nothing that needs several threads at once (shared memory, barriers) is here.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>

#define __global__
#define __device__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as on the device: UndefinedBehaviorSanitizer reports a misaligned access.
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline thread_local dim3 blockIdx, threadIdx, gridDim, blockDim;

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::nearbyintf(x)); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Blocks and threads in the order that FASTUFT_THREAD_ORDER asks for; results must not depend on it.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  static const bool backward = std::getenv("FASTUFT_THREAD_ORDER") != nullptr;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const int64_t total = int64_t{gridDim.y} * gridDim.x * blockDim.x;
  for (int64_t n = 0; n < total; ++n) {
    const int64_t at = backward ? total - 1 - n : n;
    threadIdx.x = static_cast<unsigned>(at % blockDim.x);
    threadIdx.y = threadIdx.z = 0;
    blockIdx.x = static_cast<unsigned>(at / blockDim.x % gridDim.x);
    blockIdx.y = static_cast<unsigned>(at / blockDim.x / gridDim.x);
    kernel(arguments...);
  }
  return cudaSuccess;
}
