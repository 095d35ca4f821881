// CUDA kernels of the mixing operators. Nothing here waits for the device or looks at values on the host: boxes are
// clamped to the image, a partner out of range poisons the box, no access leaves the batch. Capturable in a CUDA graph.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "tensors.h"

namespace fastuft {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int kBlocksPerSample = 32;

cudaStream_t current_stream(const Tensor& images) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(images.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, " failed to launch: ", cudaGetErrorString(error));
}

// Elements a vector access may hold: 16 bytes where the data and the distance between samples are aligned to it, so
// that a run starts at the same alignment in every sample; otherwise single elements.
template <class T>
bool vectorizable(const void* data, const void* other, const Layout& layout) {
  const int64_t sample = layout.batch_stride * static_cast<int64_t>(sizeof(T));
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(other) % kVectorBytes == 0 &&
         sample % kVectorBytes == 0;
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

__device__ Box clamped(const int32_t* boxes, int64_t row, const Layout& layout) {
  const int height = static_cast<int>(layout.height);
  const int width = static_cast<int>(layout.width);
  const int top = min(max(boxes[4 * row], 0), height);
  const int left = min(max(boxes[4 * row + 1], 0), width);
  const int bottom = min(max(boxes[4 * row + 2], top), height);
  const int right = min(max(boxes[4 * row + 3], left), width);
  return Box{top, left, bottom, right};
}

// Calls function(offset, count) for the pieces of a region, spread over the blocks of one sample: whole aligned vectors
// of N elements (count == N), and the elements before and after them in each run (count == 1).
template <int N, class Function>
__device__ void for_each_vector(const Region& region, Function function) {
  if (region.run <= 0 || region.rows() <= 0) {
    return;
  }
  const int64_t per_row = region.run / N + 2;  // vectors that a run may touch
  const int64_t total = per_row * region.rows();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < total; index += step) {
    int64_t row, place;
    if (total <= UINT32_MAX) {  // a 32-bit division is several times cheaper
      row = static_cast<uint32_t>(index) / static_cast<uint32_t>(per_row);
      place = index - row * per_row;
    } else {
      row = index / per_row;
      place = index - row * per_row;
    }
    const int64_t first = region.row_start(row);
    const int64_t last = first + region.run;
    const int64_t begin = (first / N + place) * N;
    if (begin >= last) {
      continue;
    }
    if (begin >= first && begin + N <= last) {
      function(begin, std::integral_constant<int, N>{});
    } else {
      for (int64_t e = begin > first ? begin : first; e < begin + N && e < last; ++e) {
        function(e, std::integral_constant<int, 1>{});
      }
    }
  }
}

template <class T, int N>
__device__ Vector<T, N>& vector_at(T* data, int64_t offset) {
  return *reinterpret_cast<Vector<T, N>*>(data + offset);
}

template <class T, int N>
__device__ const Vector<T, N>& vector_at(const T* data, int64_t offset) {
  return *reinterpret_cast<const Vector<T, N>*>(data + offset);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) cutmix_swap_kernel(T* data, const int32_t* boxes, Layout layout) {
  const int64_t pair = blockIdx.y;
  const Region region = region_of(layout, clamped(boxes, pair, layout));
  T* a = data + pair * layout.batch_stride;
  T* b = data + (layout.batch - 1 - pair) * layout.batch_stride;
  for_each_vector<N>(region, [&](int64_t offset, auto count) {
    constexpr int M = decltype(count)::value;
    const Vector<T, M> x = vector_at<T, M>(a, offset);
    const Vector<T, M> y = vector_at<T, M>(b, offset);
    vector_at<T, M>(a, offset) = y;
    vector_at<T, M>(b, offset) = x;
  });
}

// Whether the pixel at an offset within a sample lies in the box; divisions are by the strides of a dense sample.
__device__ bool in_box(int64_t offset, const Layout& layout, const Box& box) {
  bool inside = true;
  for (int d = 0; d < 3; ++d) {
    const Dimension& dimension = layout.dimensions[d];
    if (dimension.kind == 0) {
      continue;
    }
    int64_t at;
    if (offset <= UINT32_MAX && dimension.stride <= UINT32_MAX && dimension.size <= UINT32_MAX) {
      at = (static_cast<uint32_t>(offset) / static_cast<uint32_t>(dimension.stride)) % static_cast<uint32_t>(dimension.size);
    } else {
      at = (offset / dimension.stride) % dimension.size;
    }
    inside = inside && (dimension.kind == 1 ? at >= box.top && at < box.bottom : at >= box.left && at < box.right);
  }
  return inside;
}

template <class T>
__device__ T poison(uint64_t pattern) {
  T value;
  const T* bits = reinterpret_cast<const T*>(&pattern);
  value = *bits;
  return value;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    cutmix_kernel(const T* data, T* out, const int32_t* boxes, const int64_t* partner, Layout layout, uint64_t pattern) {
  const int64_t sample = blockIdx.y;
  const Box box = clamped(boxes, sample, layout);
  const int64_t chosen = partner[sample];
  const bool valid = chosen >= 0 && chosen < layout.batch;
  const T* own = data + sample * layout.batch_stride;
  const T* other = data + (valid ? chosen : sample) * layout.batch_stride;
  T* target = out + sample * layout.batch_stride;
  for_each_vector<N>(region_of(layout, whole(layout)), [&](int64_t offset, auto count) {
    constexpr int M = decltype(count)::value;
    bool inside[M];
    bool any = false, all = true;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      inside[i] = in_box(offset + i, layout, box);
      any = any || inside[i];
      all = all && inside[i];
    }
    // Each source is read only where it is needed.
    Vector<T, M> result;
    if (!all) {
      result = vector_at<T, M>(own, offset);
    }
    if (any) {
      const Vector<T, M> y = vector_at<T, M>(other, offset);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        if (inside[i]) {
          result.values[i] = valid ? y.values[i] : poison<T>(pattern);
        }
      }
    }
    vector_at<T, M>(target, offset) = result;
  });
}

template <class T>
struct Arithmetic {
  using Compute = float;
  static __device__ float widen(T x) { return static_cast<float>(x); }
  static __device__ T round(float x) { return static_cast<T>(x); }
};

template <>
struct Arithmetic<double> {
  using Compute = double;
  static __device__ double widen(double x) { return x; }
  static __device__ double round(double x) { return x; }
};

template <>
struct Arithmetic<uint8_t> {
  using Compute = float;
  static __device__ float widen(uint8_t x) { return x; }
  static __device__ uint8_t round(float x) { return static_cast<uint8_t>(__float2int_rn(x)); }
};

// lam x + (1 - lam) y, rounded once; a weight outside [0, 1] gives NaN (0 for bytes).
template <class T, int M>
__device__ Vector<T, M> blend(const Vector<T, M>& x, const Vector<T, M>& y, float lam, bool valid) {
  using Compute = typename Arithmetic<T>::Compute;
  const Compute weight = valid ? static_cast<Compute>(lam) : static_cast<Compute>(NAN);
  const Compute rest = 1 - weight;
  Vector<T, M> result;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    const Compute mixed = weight * Arithmetic<T>::widen(x.values[i]) + rest * Arithmetic<T>::widen(y.values[i]);
    result.values[i] = Arithmetic<T>::round(mixed);
  }
  return result;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    mixup_kernel(const T* data, T* out, const float* lam, const int64_t* partner, Layout layout) {
  const int64_t sample = blockIdx.y;
  const int64_t chosen = partner[sample];
  const bool known = chosen >= 0 && chosen < layout.batch;
  const float weight = lam[sample];
  const bool valid = known && weight >= 0 && weight <= 1;
  const T* own = data + sample * layout.batch_stride;
  const T* other = data + (known ? chosen : sample) * layout.batch_stride;
  T* target = out + sample * layout.batch_stride;
  for_each_vector<N>(region_of(layout, whole(layout)), [&](int64_t offset, auto count) {
    constexpr int M = decltype(count)::value;
    vector_at<T, M>(target, offset) = blend<T, M>(vector_at<T, M>(own, offset), vector_at<T, M>(other, offset), weight, valid);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) mixup_pair_kernel(T* data, const float* lam, Layout layout) {
  const int64_t pair = blockIdx.y;
  const float weight = lam[pair];
  const bool valid = weight >= 0 && weight <= 1;
  T* a = data + pair * layout.batch_stride;
  T* b = data + (layout.batch - 1 - pair) * layout.batch_stride;
  for_each_vector<N>(region_of(layout, whole(layout)), [&](int64_t offset, auto count) {
    constexpr int M = decltype(count)::value;
    const Vector<T, M> x = vector_at<T, M>(a, offset);
    const Vector<T, M> y = vector_at<T, M>(b, offset);
    vector_at<T, M>(a, offset) = blend<T, M>(x, y, weight, valid);
    vector_at<T, M>(b, offset) = blend<T, M>(y, x, weight, valid);
  });
}

// A launch over samples (or pairs); the grid's second dimension holds 65535 at most.
template <class Launch>
void over_samples(int64_t samples, Launch launch) {
  STD_TORCH_CHECK(samples <= 65535, "images has ", samples, " samples to mix; the most is 65535 a call");
  if (samples > 0) {
    launch(dim3(kBlocksPerSample, static_cast<unsigned>(samples)));
  }
}

// CutMix moves bytes: one instance an element size serves every dtype.
template <class Function>
void by_size(const Tensor& images, Function function) {
  switch (images.element_size()) {
    case 1:
      return function(uint8_t{});
    case 2:
      return function(uint16_t{});
    case 4:
      return function(uint32_t{});
    case 8:
      return function(uint64_t{});
    default:
      STD_TORCH_CHECK(false, "images has a dtype that cannot be mixed");
  }
}

template <class Function>
void by_type(const Tensor& images, Function function) {
  switch (images.scalar_type()) {
    case ScalarType::Byte:
      return function(uint8_t{});
    case ScalarType::Half:
      return function(__half{});
    case ScalarType::BFloat16:
      return function(__nv_bfloat16{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    default:
      STD_TORCH_CHECK(false, "images has a dtype that cannot be mixed");
  }
}

uint64_t nan_pattern(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return 0x7e00;
    case ScalarType::BFloat16:
      return 0x7fc0;
    case ScalarType::Float:
      return 0x7fc00000;
    case ScalarType::Double:
      return 0x7ff8000000000000;
    default:
      return 0;
  }
}

Tensor cutmix(const Tensor& images, const Tensor& boxes, const Tensor& partner) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Layout layout = layout_of(images);
  check_companion(boxes, ScalarType::Int, 4 * layout.batch, "boxes");
  check_companion(partner, ScalarType::Long, layout.batch, "partner");
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) {
    return out;
  }
  by_size(images, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kVectorBytes / sizeof(T);
    const T* data = static_cast<const T*>(images.const_data_ptr());
    T* target = static_cast<T*>(out.mutable_data_ptr());
    const bool wide = vectorizable<T>(data, target, layout);
    const auto kernel = wide ? cutmix_kernel<T, N> : cutmix_kernel<T, 1>;
    over_samples(layout.batch, [&](dim3 grid) {
      kernel<<<grid, kThreads, 0, current_stream(images)>>>(data, target, boxes.const_data_ptr<int32_t>(),
                                                            partner.const_data_ptr<int64_t>(), layout,
                                                            nan_pattern(images.scalar_type()));
    });
  });
  check_launch("cutmix");
  return out;
}

void cutmix_(Tensor images, const Tensor& boxes) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Layout layout = layout_of(images);
  check_companion(boxes, ScalarType::Int, 4 * (layout.batch / 2), "boxes");
  if (images.numel() == 0) {
    return;
  }
  by_size(images, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kVectorBytes / sizeof(T);
    T* data = static_cast<T*>(images.mutable_data_ptr());
    const auto kernel = vectorizable<T>(data, data, layout) ? cutmix_swap_kernel<T, N> : cutmix_swap_kernel<T, 1>;
    over_samples(layout.batch / 2, [&](dim3 grid) {
      kernel<<<grid, kThreads, 0, current_stream(images)>>>(data, boxes.const_data_ptr<int32_t>(), layout);
    });
  });
  check_launch("cutmix_");
}

Tensor mixup(const Tensor& images, const Tensor& lam, const Tensor& partner) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Layout layout = layout_of(images);
  check_companion(lam, ScalarType::Float, layout.batch, "lam");
  check_companion(partner, ScalarType::Long, layout.batch, "partner");
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) {
    return out;
  }
  by_type(images, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kVectorBytes / sizeof(T);
    const T* data = static_cast<const T*>(images.const_data_ptr());
    T* target = static_cast<T*>(out.mutable_data_ptr());
    const auto kernel = vectorizable<T>(data, target, layout) ? mixup_kernel<T, N> : mixup_kernel<T, 1>;
    over_samples(layout.batch, [&](dim3 grid) {
      kernel<<<grid, kThreads, 0, current_stream(images)>>>(data, target, lam.const_data_ptr<float>(),
                                                            partner.const_data_ptr<int64_t>(), layout);
    });
  });
  check_launch("mixup");
  return out;
}

void mixup_(Tensor images, const Tensor& lam) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Layout layout = layout_of(images);
  check_companion(lam, ScalarType::Float, layout.batch / 2, "lam");
  if (images.numel() == 0) {
    return;
  }
  by_type(images, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kVectorBytes / sizeof(T);
    T* data = static_cast<T*>(images.mutable_data_ptr());
    const auto kernel = vectorizable<T>(data, data, layout) ? mixup_pair_kernel<T, N> : mixup_pair_kernel<T, 1>;
    over_samples(layout.batch / 2, [&](dim3 grid) {
      kernel<<<grid, kThreads, 0, current_stream(images)>>>(data, lam.const_data_ptr<float>(), layout);
    });
  });
  check_launch("mixup_");
}

}  // namespace
}  // namespace fastuft

STABLE_TORCH_LIBRARY_IMPL(fastuft, CUDA, m) {
  m.impl("cutmix", TORCH_BOX(&fastuft::cutmix));
  m.impl("cutmix_", TORCH_BOX(&fastuft::cutmix_));
  m.impl("mixup", TORCH_BOX(&fastuft::mixup));
  m.impl("mixup_", TORCH_BOX(&fastuft::mixup_));
}
