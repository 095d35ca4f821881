// The memory of a box's pixels, for any layout: contiguous runs under at most three loops.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTUFT_HOST_DEVICE __host__ __device__
#else
#define FASTUFT_HOST_DEVICE
#endif

namespace fastuft {

enum class Axis { kChannel, kHeight, kWidth };

// One of the dimensions C, H, W of a sample.
struct Dimension {
  int64_t size;
  int64_t stride;
  Axis axis;
};

// A batch of images; dimensions sorted by stride, smallest first. Sizes and strides count elements.
struct Layout {
  int64_t batch;
  int64_t batch_stride;
  int64_t height;
  int64_t width;
  Dimension dimensions[3];

  // One more than the largest offset of an element within a sample.
  FASTUFT_HOST_DEVICE int64_t extent() const {
    int64_t last = 0;
    for (const Dimension& dimension : dimensions) {
      last += (dimension.size - 1) * dimension.stride;
    }
    return last + 1;
  }
};

struct Box {
  int64_t top, left, bottom, right;
};

// The pixels of a box of one sample: `run` consecutive elements at
// start + i0 strides[0] + i1 strides[1] + i2 strides[2] for all indices below counts, i0 varying fastest.
// Offsets grow with the row, because strides are sorted.
template <class Index>
struct Region {
  Index start;
  Index run;
  Index counts[3];
  Index strides[3];

  // Rows with pixels in them.
  FASTUFT_HOST_DEVICE Index rows() const { return run > 0 ? counts[0] * counts[1] * counts[2] : 0; }

  FASTUFT_HOST_DEVICE Index row_start(Index row) const {
    // Divisions are slow, and there is rarely more than one loop.
    const Index i12 = counts[0] == 1 ? row : row / counts[0];
    const Index i2 = counts[1] == 1 ? i12 : i12 / counts[1];
    return start + (row - i12 * counts[0]) * strides[0] + (i12 - i2 * counts[1]) * strides[1] + i2 * strides[2];
  }
};

template <class Index>
FASTUFT_HOST_DEVICE Region<Index> region_of(const Layout& layout, const Box& box) {
  Region<Index> region{0, 1, {1, 1, 1}, {0, 0, 0}};
  bool gapless = true;
  for (int d = 0; d < 3; ++d) {
    const Dimension& dimension = layout.dimensions[d];
    Index first = 0;
    Index count = static_cast<Index>(dimension.size);
    if (dimension.axis == Axis::kHeight) {
      first = static_cast<Index>(box.top);
      count = static_cast<Index>(box.bottom - box.top);
    } else if (dimension.axis == Axis::kWidth) {
      first = static_cast<Index>(box.left);
      count = static_cast<Index>(box.right - box.left);
    }
    const Index stride = static_cast<Index>(dimension.stride);
    region.start += first * stride;
    // A dimension that continues the run without a gap lengthens it; the others are loops.
    gapless = gapless && stride == region.run;
    if (gapless) {
      region.run *= count;
    } else {
      region.counts[d] = count;
      region.strides[d] = stride;
    }
  }
  return region;
}

// The starts of a region's rows one after the other, without the divisions of row_start.
class RowWalk {
 public:
  explicit RowWalk(const Region<int64_t>& region) : region_(region), left_(region.rows()), start_(region.start) {}

  bool done() const { return left_ == 0; }
  int64_t start() const { return start_; }

  void advance() {
    --left_;
    start_ += region_.strides[0];
    if (++inner_ == region_.counts[0]) {
      inner_ = 0;
      start_ += region_.strides[1] - region_.counts[0] * region_.strides[0];
      if (++middle_ == region_.counts[1]) {
        middle_ = 0;
        start_ += region_.strides[2] - region_.counts[1] * region_.strides[1];
      }
    }
  }

 private:
  Region<int64_t> region_;
  int64_t left_, start_, inner_ = 0, middle_ = 0;
};

// Pairs of an in-place form: within each group of `group` samples, the first with the last, and so on inwards.
struct Pairing {
  int64_t pairs;
  uint32_t group;  // 32 bits divide faster on a GPU, in fewer registers

  FASTUFT_HOST_DEVICE int64_t first(int64_t pair) const { return start(pair) + place(pair); }
  FASTUFT_HOST_DEVICE int64_t last(int64_t pair) const { return start(pair) + (group - 1 - place(pair)); }

 private:
  FASTUFT_HOST_DEVICE int64_t start(int64_t pair) const {
    return static_cast<int64_t>(static_cast<uint32_t>(pair) / (group / 2)) * group;
  }
  FASTUFT_HOST_DEVICE uint32_t place(int64_t pair) const { return static_cast<uint32_t>(pair) % (group / 2); }
};

FASTUFT_HOST_DEVICE inline Box whole(const Layout& layout) { return Box{0, 0, layout.height, layout.width}; }

}  // namespace fastuft
