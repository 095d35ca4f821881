// Where the pixels of a box lie in memory, for any layout: contiguous runs under at most three loops.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTUFT_HOST_DEVICE __host__ __device__
#else
#define FASTUFT_HOST_DEVICE
#endif

namespace fastuft {

// One of the dimensions C, H, W of a sample. `kind` is 0 for C, 1 for H, 2 for W.
struct Dimension {
  int64_t size;
  int64_t stride;
  int kind;
};

// A batch of images; dimensions sorted by stride, smallest first. Sizes and strides count elements.
struct Layout {
  int64_t batch;
  int64_t batch_stride;
  int64_t height;
  int64_t width;
  Dimension dimensions[3];
};

// The pixels of a box of one sample: `run` consecutive elements at
// start + i0 strides[0] + i1 strides[1] + i2 strides[2] for all indices below counts.
struct Region {
  int64_t start;
  int64_t run;
  int64_t counts[3];
  int64_t strides[3];

  FASTUFT_HOST_DEVICE int64_t rows() const { return counts[0] * counts[1] * counts[2]; }

  FASTUFT_HOST_DEVICE int64_t row_start(int64_t row) const {
    const int64_t i0 = row % counts[0];
    const int64_t rest = row / counts[0];
    return start + i0 * strides[0] + (rest % counts[1]) * strides[1] + (rest / counts[1]) * strides[2];
  }
};

struct Box {
  int64_t top, left, bottom, right;
};

FASTUFT_HOST_DEVICE inline Region region_of(const Layout& layout, const Box& box) {
  Region region{0, 1, {1, 1, 1}, {0, 0, 0}};
  int loops = 0;
  for (int d = 0; d < 3; ++d) {
    const Dimension& dimension = layout.dimensions[d];
    int64_t first = 0;
    int64_t count = dimension.size;
    if (dimension.kind == 1) {
      first = box.top;
      count = box.bottom - box.top;
    } else if (dimension.kind == 2) {
      first = box.left;
      count = box.right - box.left;
    }
    region.start += first * dimension.stride;
    // A dimension that continues the run without a gap lengthens it; the others become loops.
    if (loops == 0 && dimension.stride == region.run) {
      region.run *= count;
    } else {
      region.counts[loops] = count;
      region.strides[loops] = dimension.stride;
      ++loops;
    }
  }
  return region;
}

FASTUFT_HOST_DEVICE inline Box whole(const Layout& layout) { return Box{0, 0, layout.height, layout.width}; }

}  // namespace fastuft
