// From stable-ABI tensors to plain layouts.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

#include "geometry.h"

namespace fastuft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Layout layout_of(const Tensor& images) {
  STD_TORCH_CHECK(images.dim() == 4, "images must be [B, C, H, W]");
  Layout layout{images.size(0), images.stride(0), images.size(2), images.size(3), {}};
  for (int d = 0; d < 3; ++d) {
    // The stride of a dimension of size 1 has no meaning; 1 lets it join any run.
    const int64_t size = images.size(d + 1);
    layout.dimensions[d] = Dimension{size, size == 1 ? 1 : images.stride(d + 1), static_cast<Axis>(d)};
  }
  std::stable_sort(layout.dimensions, layout.dimensions + 3, [](const Dimension& a, const Dimension& b) {
    return a.stride != b.stride ? a.stride < b.stride : a.size < b.size;
  });
  return layout;
}

// `group` samples pair among themselves; 0 stands for the whole batch.
inline Pairing pairing_of(const Layout& layout, int64_t group) {
  const int64_t size = group == 0 ? layout.batch : group;
  STD_TORCH_CHECK(size >= 0 && (size == 0 || layout.batch % size == 0), "group does not divide the batch");
  STD_TORCH_CHECK(layout.batch <= std::numeric_limits<uint32_t>::max(), "the batch is too large");
  return Pairing{size == 0 ? 0 : layout.batch / size * (size / 2), static_cast<uint32_t>(size)};
}

// Whether the elements fill a block of memory, each once, in any order of dimensions.
inline bool is_dense(const Tensor& images) {
  int left = 0;
  for (int d = 0; d < 4; ++d) {
    left += images.size(d) != 1;
  }
  int64_t expected = 1;
  for (bool found = true; found && left > 0;) {
    found = false;
    for (int d = 0; d < 4 && !found; ++d) {
      if (images.size(d) != 1 && images.stride(d) == expected) {
        expected *= images.size(d);
        --left;
        found = true;
      }
    }
  }
  return left == 0;
}

// The images themselves where they are dense, else a copy with the strides that empty_like gives: so an output made by
// empty_like has the layout of what this returns.
inline Tensor dense(const Tensor& images) {
  STD_TORCH_CHECK(images.dim() == 4, "images must be [B, C, H, W]");
  if (images.numel() == 0 || is_dense(images)) {
    return images;
  }
  Tensor copy = torch::stable::empty_like(images);
  torch::stable::copy_(copy, images);
  return copy;
}

// Boxes, partners and weights are small: the Python side hands them over contiguous.
inline void check_companion(const Tensor& value, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(value.scalar_type() == type && value.numel() == numel && value.is_contiguous(),
                  name, " has another dtype, size or layout than expected");
}

}  // namespace fastuft
