// CUDA kernels of the mixing operators. Nothing here waits for the device or looks at values on the host: boxes are
// clamped to the image, a partner out of range poisons the box, no access leaves the batch. Capturable in a CUDA graph.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <type_traits>

#include "tensors.h"

// Named, not anonymous: nvcc puts a hash of this file's path into the names of an anonymous namespace, and the same sources
// would give another library in another folder.
namespace fastuft::cuda {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr int kVectorsPerThread = 4;
constexpr int64_t kMaxBlocks = 4096;  // blocks per sample; loops cover the rest
constexpr int64_t kMaxGridY = 65535;
// Blocks that a multiprocessor must have room for; 0 leaves it to the compiler, which would spill a few registers in these two.
constexpr int swap_blocks(int vector) { return vector == 8 ? 5 : 0; }
constexpr int cutmix_blocks(int vector) { return vector == 16 ? 4 : 0; }
// Samples below this many elements are indexed in 32 bits: sums of offset and step stay below 2^31 then.
constexpr int64_t kMax32BitExtent = int64_t{1} << 29;

cudaStream_t current_stream(const Tensor& images) {
  void* stream = nullptr;
  // Without a macro: torch 2.11 and later torches name theirs differently.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(images.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// A grid's second dimension runs over samples (or pairs), its first over the vectors of one sample.
dim3 grid_of(const Tensor& images, int64_t samples, int vector) {
  const int64_t per_block = int64_t{kThreads} * kVectorsPerThread * vector;
  const int64_t blocks = (images.numel() / images.size(0) + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)), static_cast<unsigned>(std::min(samples, kMaxGridY)));
}

// Launches on the images' current stream.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const dim3& grid, const Tensor& images,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = current_stream(images);
  cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, " failed to launch: ", cudaGetErrorString(error));
}

// Division by a number known before the launch. In 32 bits by one multiplication and a shift (Granlund and Montgomery
// 1994), for dividends below 2^31.
template <class Index>
struct Divisor;

template <>
struct Divisor<uint32_t> {
  uint32_t value, magic, shift;

  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)), shift(0) {
    while ((uint64_t{1} << shift) < value) {
      ++shift;
    }
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - value)) / value + 1);
  }

  __device__ uint32_t quotient(uint32_t dividend) const { return (__umulhi(dividend, magic) + dividend) >> shift; }
};

template <>
struct Divisor<int64_t> {
  int64_t value;

  explicit Divisor(int64_t divisor) : value(divisor) {}

  __device__ int64_t quotient(int64_t dividend) const { return dividend / value; }
};

// A box in terms of rows and places along them.
template <class Index>
struct Span {
  Index outer_begin, outer_end, inner_begin, inner_end;

  __device__ bool has_row(Index outer) const { return outer >= outer_begin && outer < outer_end; }
};

// How a dense sample crosses a box. The nearer of H and W in memory, with the dimensions below it, forms rows of `length`
// elements. A row crosses the box in one span or not at all, depending on its position along the other of H and W.
template <class Index>
struct Crossing {
  Divisor<Index> length;
  Divisor<Index> rows_per_step;  // rows between two places of the outer dimension
  Divisor<Index> steps;          // size of the outer dimension
  Index unit;                    // stride of the inner dimension
  bool inner_is_width;

  __device__ Span<Index> span_of(const Box& box) const {
    const int64_t outer_begin = inner_is_width ? box.top : box.left, outer_end = inner_is_width ? box.bottom : box.right;
    const int64_t inner_begin = inner_is_width ? box.left : box.top, inner_end = inner_is_width ? box.right : box.bottom;
    return {static_cast<Index>(outer_begin), static_cast<Index>(outer_end), static_cast<Index>(inner_begin) * unit,
            static_cast<Index>(inner_end) * unit};
  }

  __device__ Index outer_of(Index row) const {
    const Index step = rows_per_step.quotient(row);
    return step - steps.quotient(step) * steps.value;
  }

  __device__ bool is_inside(const Span<Index>& span, Index offset) const {
    const Index row = length.quotient(offset);
    const Index place = offset - row * length.value;
    return span.has_row(outer_of(row)) && place >= span.inner_begin && place < span.inner_end;
  }
};

template <class Index>
Crossing<Index> crossing_of(const Layout& layout) {
  const Dimension* inner = nullptr;
  const Dimension* outer = nullptr;
  for (const Dimension& dimension : layout.dimensions) {
    if (dimension.axis != Axis::kChannel) {
      (inner == nullptr ? inner : outer) = &dimension;
    }
  }
  const int64_t length = inner->size * inner->stride;
  // A dimension of one element has no stride of its own: the outer one is then one step, or follows the row.
  const int64_t rows_per_step = outer->size == 1 ? 1 : outer->stride / length;
  return {Divisor<Index>(length), Divisor<Index>(rows_per_step), Divisor<Index>(outer->size),
          static_cast<Index>(inner->stride), inner->axis == Axis::kWidth};
}

template <class T, int N>
struct Values {
  T at[N];
};

// Elements low <= offset < high of a sample, all in the vector of N elements that starts at begin.
template <class Index>
struct Piece {
  Index begin, low, high;

  __device__ bool has(Index offset) const { return low <= offset && offset < high; }
};

// A whole vector even for a piece of it, where the sample reaches that far; what is not of the piece is never stored.
template <class T, int N, class Index>
__device__ Values<T, N> load(const T* sample, const Piece<Index>& piece, Index extent) {
  Values<T, N> values{};
  if constexpr (N > 1) {
    static_assert(sizeof(T) * N == kVectorBytes);
    if (piece.begin + N <= extent) {
      const uint4 bits = *reinterpret_cast<const uint4*>(sample + piece.begin);
      memcpy(&values, &bits, kVectorBytes);
      return values;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (piece.has(piece.begin + i)) {
      values.at[i] = sample[piece.begin + i];
    }
  }
  return values;
}

// Only the piece: another thread, or nobody, may write the rest of the vector.
template <class T, int N, class Index>
__device__ void store(T* sample, const Piece<Index>& piece, const Values<T, N>& values) {
  if constexpr (N > 1) {
    if (piece.high - piece.low == N) {
      uint4 bits;
      memcpy(&bits, &values, kVectorBytes);
      *reinterpret_cast<uint4*>(sample + piece.begin) = bits;
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (piece.has(piece.begin + i)) {
      sample[piece.begin + i] = values.at[i];
    }
  }
}

__device__ Box clamped(const int32_t* boxes, int64_t row, const Layout& layout) {
  const int height = static_cast<int>(layout.height);
  const int width = static_cast<int>(layout.width);
  const int top = min(max(boxes[4 * row], 0), height);
  const int left = min(max(boxes[4 * row + 1], 0), width);
  const int bottom = min(max(boxes[4 * row + 2], top), height);
  const int right = min(max(boxes[4 * row + 3], left), width);
  return Box{top, left, bottom, right};
}

// Calls function(piece) for every vector of N elements, or part of one, in a region, spread over the blocks of one
// sample.
template <int N, class Index, class Function>
__device__ void for_each_piece(const Region<Index>& region, Function function) {
  const Index rows = region.rows();
  if (rows == 0) {
    return;
  }
  const Index per_row = (region.run + N - 2) / N + 1;  // vectors that a run touches at most
  const Index total = per_row * rows;
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  for (Index index = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; index < total; index += step) {
    const Index row = rows == 1 ? 0 : index / per_row;
    const Index first = region.row_start(row);
    const Index begin = (first / N + (index - row * per_row)) * N;
    const Piece<Index> piece{begin, max(begin, first), min(begin + N, first + region.run)};
    if (piece.low < piece.high) {
      function(piece);
    }
  }
}

template <class T, int N, class Index>
__global__ void __launch_bounds__(kThreads, swap_blocks(N))
    cutmix_swap_kernel(T* __restrict__ data, const int32_t* __restrict__ boxes, const Layout layout,
                       const Pairing pairing) {
  const Index extent = static_cast<Index>(layout.extent());
  for (int64_t pair = blockIdx.y; pair < pairing.pairs; pair += gridDim.y) {
    T* a = data + pairing.first(pair) * layout.batch_stride;
    T* b = data + pairing.last(pair) * layout.batch_stride;
    for_each_piece<N>(region_of<Index>(layout, clamped(boxes, pair, layout)), [&](const Piece<Index>& piece) {
      const Values<T, N> x = load<T, N>(a, piece, extent);
      const Values<T, N> y = load<T, N>(b, piece, extent);
      store<T, N>(a, piece, y);
      store<T, N>(b, piece, x);
    });
  }
}

template <class T, int N, class Index>
__global__ void __launch_bounds__(kThreads, cutmix_blocks(N))
    cutmix_kernel(const T* __restrict__ data, T* __restrict__ out, const int32_t* __restrict__ boxes,
                  const int64_t* __restrict__ partner, const Layout layout, const Crossing<Index> crossing,
                  const T poison) {
  const Region<Index> all = region_of<Index>(layout, whole(layout));
  const Index extent = static_cast<Index>(layout.extent());
  for (int64_t sample = blockIdx.y; sample < layout.batch; sample += gridDim.y) {
    const Span<Index> span = crossing.span_of(clamped(boxes, sample, layout));
    const int64_t chosen = partner[sample];
    const bool known = chosen >= 0 && chosen < layout.batch;
    const T* own = data + sample * layout.batch_stride;
    const T* other = data + (known ? chosen : sample) * layout.batch_stride;
    T* target = out + sample * layout.batch_stride;
    for_each_piece<N>(all, [&](const Piece<Index>& piece) {
      const Index row = crossing.length.quotient(piece.begin);
      const Index place = piece.begin - row * crossing.length.value;
      const bool one_row = place + N <= crossing.length.value;
      const bool touches = span.has_row(crossing.outer_of(row)) && place < span.inner_end && place + N > span.inner_begin;
      const bool within = touches && place >= span.inner_begin && place + N <= span.inner_end;
      Values<T, N> result = load<T, N>(within ? other : own, piece, extent);
      if (!one_row || (touches && !(within && known))) {
        // A vector on the border of the box, or that reaches into the next row, or whose partner is not known.
        uint32_t inside = N == 1;
        if constexpr (N > 1) {
#pragma unroll 1  // rarely taken, so fewer registers matter more
          for (int i = 0; i < N; ++i) {
            inside |= static_cast<uint32_t>(crossing.is_inside(span, piece.begin + i)) << i;
          }
        }
        const Values<T, N> x = load<T, N>(own, piece, extent);
        const Values<T, N> y = load<T, N>(other, piece, extent);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          result.at[i] = (inside >> i & 1) == 0 ? x.at[i] : known ? y.at[i] : poison;
        }
      }
      store<T, N>(target, piece, result);
    });
  }
}

// Conversions between a dtype and what it is mixed in; bytes round half to even.
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

// A weight that is not in [0, 1], or a partner that is not in the batch, gives NaN (0 for bytes).
template <class T>
__device__ typename Arithmetic<T>::Compute weight_of(float lam, bool known) {
  using Compute = typename Arithmetic<T>::Compute;
  return known && lam >= 0 && lam <= 1 ? static_cast<Compute>(lam) : static_cast<Compute>(NAN);
}

// lam x + (1 - lam) y, rounded once.
template <class T, int N>
__device__ Values<T, N> blend(const Values<T, N>& x, const Values<T, N>& y, typename Arithmetic<T>::Compute lam) {
  const typename Arithmetic<T>::Compute rest = 1 - lam;
  Values<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    result.at[i] = Arithmetic<T>::round(lam * Arithmetic<T>::widen(x.at[i]) + rest * Arithmetic<T>::widen(y.at[i]));
  }
  return result;
}

template <class T, int N, class Index>
__global__ void __launch_bounds__(kThreads)
    mixup_kernel(const T* __restrict__ data, T* __restrict__ out, const float* __restrict__ lam,
                 const int64_t* __restrict__ partner, const Layout layout) {
  const Region<Index> all = region_of<Index>(layout, whole(layout));
  const Index extent = static_cast<Index>(layout.extent());
  for (int64_t sample = blockIdx.y; sample < layout.batch; sample += gridDim.y) {
    const int64_t chosen = partner[sample];
    const bool known = chosen >= 0 && chosen < layout.batch;
    const auto weight = weight_of<T>(lam[sample], known);
    const T* own = data + sample * layout.batch_stride;
    const T* other = data + (known ? chosen : sample) * layout.batch_stride;
    T* target = out + sample * layout.batch_stride;
    for_each_piece<N>(all, [&](const Piece<Index>& piece) {
      const Values<T, N> x = load<T, N>(own, piece, extent);
      const Values<T, N> y = load<T, N>(other, piece, extent);
      store<T, N>(target, piece, blend<T, N>(x, y, weight));
    });
  }
}

template <class T, int N, class Index>
__global__ void __launch_bounds__(kThreads)
    mixup_pair_kernel(T* __restrict__ data, const float* __restrict__ lam, const Layout layout, const Pairing pairing) {
  const Region<Index> all = region_of<Index>(layout, whole(layout));
  const Index extent = static_cast<Index>(layout.extent());
  for (int64_t pair = blockIdx.y; pair < pairing.pairs; pair += gridDim.y) {
    const auto weight = weight_of<T>(lam[pair], true);
    T* a = data + pairing.first(pair) * layout.batch_stride;
    T* b = data + pairing.last(pair) * layout.batch_stride;
    for_each_piece<N>(all, [&](const Piece<Index>& piece) {
      const Values<T, N> x = load<T, N>(a, piece, extent);
      const Values<T, N> y = load<T, N>(b, piece, extent);
      store<T, N>(a, piece, blend<T, N>(x, y, weight));
      store<T, N>(b, piece, blend<T, N>(y, x, weight));
    });
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

// Calls function(N, zero of the index type): vectors of 16 bytes where the data and the distance between samples are
// aligned to them, so that a run starts at the same alignment in every sample; single elements and 64-bit indices
// otherwise need no alignment and no limit.
template <class T, class Function>
void by_access(const void* data, const void* other, const Layout& layout, Function function) {
  const int64_t sample = layout.batch_stride * static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
                       reinterpret_cast<uintptr_t>(other) % kVectorBytes == 0 && sample % kVectorBytes == 0;
  if (layout.extent() >= kMax32BitExtent) {
    function(std::integral_constant<int, 1>{}, int64_t{});
  } else if (aligned) {
    function(std::integral_constant<int, kVectorBytes / sizeof(T)>{}, uint32_t{});
  } else {
    function(std::integral_constant<int, 1>{}, uint32_t{});
  }
}

uint64_t nan_bits(ScalarType type) {
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

Tensor cutmix(const Tensor& given, const Tensor& boxes, const Tensor& partner) {
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor images = dense(given);
  const Layout layout = layout_of(images);
  check_companion(boxes, ScalarType::Int, 4 * layout.batch, "boxes");
  check_companion(partner, ScalarType::Long, layout.batch, "partner");
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) {
    return out;
  }
  by_size(images, [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(images.const_data_ptr());
    T* target = static_cast<T*>(out.mutable_data_ptr());
    by_access<T>(data, target, layout, [&](auto vector, auto index) {
      using Index = decltype(index);
      constexpr int N = decltype(vector)::value;
      launch("cutmix", cutmix_kernel<T, N, Index>, grid_of(images, layout.batch, N), images, data, target,
             boxes.const_data_ptr<int32_t>(), partner.const_data_ptr<int64_t>(), layout, crossing_of<Index>(layout),
             static_cast<T>(nan_bits(images.scalar_type())));
    });
  });
  return out;
}

void cutmix_(Tensor images, const Tensor& boxes, int64_t group) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Layout layout = layout_of(images);
  const Pairing pairing = pairing_of(layout, group);
  check_companion(boxes, ScalarType::Int, 4 * pairing.pairs, "boxes");
  if (images.numel() == 0 || pairing.pairs == 0) {
    return;
  }
  by_size(images, [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(images.mutable_data_ptr());
    by_access<T>(data, data, layout, [&](auto vector, auto index) {
      constexpr int N = decltype(vector)::value;
      launch("cutmix_", cutmix_swap_kernel<T, N, decltype(index)>, grid_of(images, pairing.pairs, N), images, data,
             boxes.const_data_ptr<int32_t>(), layout, pairing);
    });
  });
}

Tensor mixup(const Tensor& given, const Tensor& lam, const Tensor& partner) {
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const Tensor images = dense(given);
  const Layout layout = layout_of(images);
  check_companion(lam, ScalarType::Float, layout.batch, "lam");
  check_companion(partner, ScalarType::Long, layout.batch, "partner");
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) {
    return out;
  }
  by_type(images, [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(images.const_data_ptr());
    T* target = static_cast<T*>(out.mutable_data_ptr());
    by_access<T>(data, target, layout, [&](auto vector, auto index) {
      constexpr int N = decltype(vector)::value;
      launch("mixup", mixup_kernel<T, N, decltype(index)>, grid_of(images, layout.batch, N), images, data, target,
             lam.const_data_ptr<float>(), partner.const_data_ptr<int64_t>(), layout);
    });
  });
  return out;
}

void mixup_(Tensor images, const Tensor& lam, int64_t group) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const Layout layout = layout_of(images);
  const Pairing pairing = pairing_of(layout, group);
  check_companion(lam, ScalarType::Float, pairing.pairs, "lam");
  if (images.numel() == 0 || pairing.pairs == 0) {
    return;
  }
  by_type(images, [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(images.mutable_data_ptr());
    by_access<T>(data, data, layout, [&](auto vector, auto index) {
      constexpr int N = decltype(vector)::value;
      launch("mixup_", mixup_pair_kernel<T, N, decltype(index)>, grid_of(images, pairing.pairs, N), images, data,
             lam.const_data_ptr<float>(), layout, pairing);
    });
  });
}

}  // namespace fastuft::cuda

STABLE_TORCH_LIBRARY_IMPL(fastuft, CUDA, m) {
  m.impl("cutmix", TORCH_BOX(&fastuft::cuda::cutmix));
  m.impl("cutmix_", TORCH_BOX(&fastuft::cuda::cutmix_));
  m.impl("mixup", TORCH_BOX(&fastuft::cuda::mixup));
  m.impl("mixup_", TORCH_BOX(&fastuft::cuda::mixup_));
}
