// Schemas of the mixing operators and their CPU kernels: parallel over samples, contiguous runs at memory speed.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <type_traits>

#include "tensors.h"

namespace fastuft {
namespace {

Box box_at(const int32_t* boxes, int64_t row) {
  return Box{boxes[4 * row], boxes[4 * row + 1], boxes[4 * row + 2], boxes[4 * row + 3]};
}

template <class Function>
void for_each_row(const Region& region, Function function) {
  const int64_t rows = region.run > 0 ? region.rows() : 0;
  for (int64_t row = 0; row < rows; ++row) {
    function(region.row_start(row));
  }
}

void copy_region(char* to, const char* from, const Region& region, int64_t itemsize) {
  for_each_row(region, [&](int64_t start) {
    std::memcpy(to + start * itemsize, from + start * itemsize, region.run * itemsize);
  });
}

void swap_region(char* a, char* b, const Region& region, int64_t itemsize) {
  constexpr int64_t kBuffer = 4096;
  char buffer[kBuffer];
  for_each_row(region, [&](int64_t start) {
    char* x = a + start * itemsize;
    char* y = b + start * itemsize;
    for (int64_t left = region.run * itemsize; left > 0; left -= kBuffer) {
      const int64_t size = left < kBuffer ? left : kBuffer;
      std::memcpy(buffer, x, size);
      std::memcpy(x, y, size);
      std::memcpy(y, buffer, size);
      x += size;
      y += size;
    }
  });
}

Tensor cutmix(const Tensor& images, const Tensor& boxes, const Tensor& partner) {
  const Layout layout = layout_of(images);
  check_companion(boxes, ScalarType::Int, 4 * layout.batch, "boxes");
  check_companion(partner, ScalarType::Long, layout.batch, "partner");
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) {
    return out;
  }
  const int64_t itemsize = images.element_size();
  const int64_t sample = layout.batch_stride * itemsize;
  const char* source = static_cast<const char*>(images.const_data_ptr());
  char* target = static_cast<char*>(out.mutable_data_ptr());
  const int32_t* box = boxes.const_data_ptr<int32_t>();
  const int64_t* other = partner.const_data_ptr<int64_t>();
  const Region all = region_of(layout, whole(layout));
  torch::stable::parallel_for(0, layout.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // The box is written twice, the second time while its lines are still in the cache.
      copy_region(target + i * sample, source + i * sample, all, itemsize);
      copy_region(target + i * sample, source + other[i] * sample, region_of(layout, box_at(box, i)), itemsize);
    }
  });
  return out;
}

void cutmix_(Tensor images, const Tensor& boxes) {
  const Layout layout = layout_of(images);
  const int64_t pairs = layout.batch / 2;
  check_companion(boxes, ScalarType::Int, 4 * pairs, "boxes");
  if (images.numel() == 0) {
    return;
  }
  const int64_t itemsize = images.element_size();
  const int64_t sample = layout.batch_stride * itemsize;
  char* data = static_cast<char*>(images.mutable_data_ptr());
  const int32_t* box = boxes.const_data_ptr<int32_t>();
  torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Region region = region_of(layout, box_at(box, i));
      swap_region(data + i * sample, data + (layout.batch - 1 - i) * sample, region, itemsize);
    }
  });
}

// lam x + (1 - lam) y in fp32 (fp64 for fp64), rounded once; bytes round half to even, as torch.round does.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
T blend(T x, T y, Compute<T> lam, Compute<T> rest) {
  const Compute<T> mixed = lam * static_cast<Compute<T>>(x) + rest * static_cast<Compute<T>>(y);
  if constexpr (std::is_same_v<T, uint8_t>) {
    // Adding 2^23 leaves no fraction bits, so the sum is rounded half to even; unlike a library call it vectorizes.
    constexpr float kNoFraction = 8388608.0f;
    return static_cast<uint8_t>(static_cast<int32_t>((mixed + kNoFraction) - kNoFraction));
  } else {
    return static_cast<T>(mixed);
  }
}

template <class T>
void mixup_samples(const Tensor& images, Tensor& out, const float* lam, const int64_t* other) {
  const Layout layout = layout_of(images);
  const Region all = region_of(layout, whole(layout));
  const T* source = static_cast<const T*>(images.const_data_ptr());
  T* target = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, layout.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Compute<T> weight = lam[i], rest = 1 - weight;
      for_each_row(all, [&](int64_t start) {
        const T* x = source + i * layout.batch_stride + start;
        const T* y = source + other[i] * layout.batch_stride + start;
        T* result = target + i * layout.batch_stride + start;
        for (int64_t e = 0; e < all.run; ++e) {
          result[e] = blend<T>(x[e], y[e], weight, rest);
        }
      });
    }
  });
}

template <class T>
void mixup_pairs(Tensor& images, const float* lam) {
  const Layout layout = layout_of(images);
  const Region all = region_of(layout, whole(layout));
  T* data = static_cast<T*>(images.mutable_data_ptr());
  torch::stable::parallel_for(0, layout.batch / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Compute<T> weight = lam[i], rest = 1 - weight;
      for_each_row(all, [&](int64_t start) {
        T* x = data + i * layout.batch_stride + start;
        T* y = data + (layout.batch - 1 - i) * layout.batch_stride + start;
        for (int64_t e = 0; e < all.run; ++e) {
          const T first = x[e], last = y[e];
          x[e] = blend<T>(first, last, weight, rest);
          y[e] = blend<T>(last, first, weight, rest);
        }
      });
    }
  });
}

template <class Function>
void dispatch(ScalarType type, Function function) {
  switch (type) {
    case ScalarType::Byte:
      return function(uint8_t{});
    case ScalarType::Half:
      return function(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    default:
      STD_TORCH_CHECK(false, "images has a dtype that cannot be mixed");
  }
}

Tensor mixup(const Tensor& images, const Tensor& lam, const Tensor& partner) {
  check_companion(lam, ScalarType::Float, images.size(0), "lam");
  check_companion(partner, ScalarType::Long, images.size(0), "partner");
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() > 0) {
    dispatch(images.scalar_type(), [&](auto zero) {
      mixup_samples<decltype(zero)>(images, out, lam.const_data_ptr<float>(), partner.const_data_ptr<int64_t>());
    });
  }
  return out;
}

void mixup_(Tensor images, const Tensor& lam) {
  check_companion(lam, ScalarType::Float, images.size(0) / 2, "lam");
  if (images.numel() > 0) {
    dispatch(images.scalar_type(), [&](auto zero) { mixup_pairs<decltype(zero)>(images, lam.const_data_ptr<float>()); });
  }
}

}  // namespace
}  // namespace fastuft

STABLE_TORCH_LIBRARY_FRAGMENT(fastuft, m) {
  m.def("cutmix(Tensor images, Tensor boxes, Tensor partner) -> Tensor");
  m.def("cutmix_(Tensor(a!) images, Tensor boxes) -> ()");
  m.def("mixup(Tensor images, Tensor lam, Tensor partner) -> Tensor");
  m.def("mixup_(Tensor(a!) images, Tensor lam) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastuft, CPU, m) {
  m.impl("cutmix", TORCH_BOX(&fastuft::cutmix));
  m.impl("cutmix_", TORCH_BOX(&fastuft::cutmix_));
  m.impl("mixup", TORCH_BOX(&fastuft::mixup));
  m.impl("mixup_", TORCH_BOX(&fastuft::mixup_));
}
