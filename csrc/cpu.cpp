// Schemas of the mixing operators and their CPU kernels: parallel over samples, contiguous runs at memory speed.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensors.h"

// Inner loops are compiled twice on x86-64, for any processor and for those with AVX2, and chosen when loaded. (AVX-512
// gains nothing: vectors of a whole cache line cross a border at nearly every unaligned address.)
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define FASTUFT_VECTORIZED __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FASTUFT_VECTORIZED
#endif

// Helpers of these loops, which take their instruction set only where they are inlined.
#define FASTUFT_INLINE __attribute__((always_inline))

#if defined(__x86_64__)
#define FASTUFT_STREAMING_STORES
#include <emmintrin.h>
#endif

namespace fastuft {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kLine = 64;  // bytes of a cache line

// How CutMix walks through samples that are composed side by side, in bytes: read at a time from each, and fetched ahead.
// Longer bands lose what the first level of the cache holds, and more samples at once take longer than one after the other.
constexpr int64_t kBand = 512, kAhead = 1024, kTogether = 3;

Box box_at(const int32_t* boxes, int64_t row) {
  return Box{boxes[4 * row], boxes[4 * row + 1], boxes[4 * row + 2], boxes[4 * row + 3]};
}

// Values are checked here again, before anything is written: compiled programs and direct calls of the operators come
// without the Python side's checks.
void check_boxes(const int32_t* boxes, int64_t rows, const Layout& layout) {
  for (int64_t row = 0; row < rows; ++row) {
    const Box box = box_at(boxes, row);
    STD_TORCH_CHECK(0 <= box.top && box.top <= box.bottom && box.bottom <= layout.height && 0 <= box.left &&
                        box.left <= box.right && box.right <= layout.width,
                    "boxes[", row, "] does not fit the images");
  }
}

void check_partners(const int64_t* partner, int64_t batch) {
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(0 <= partner[i] && partner[i] < batch, "partner[", i, "] is out of range");
  }
}

void check_weights(const float* lam, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(lam[row] >= 0 && lam[row] <= 1, "lam[", row, "] is not in [0, 1]");
  }
}

// `size` bytes, at most twice `Width` and at least as many, by two vectors that may overlap.
template <int64_t Width>
inline FASTUFT_INLINE void copy_ends(char* __restrict to, const char* __restrict from, int64_t size) {
  std::memcpy(to, from, Width);
  std::memcpy(to + size - Width, from + size - Width, Width);
}

// A run of any length. Faster than memcpy, whose calls count beside the short runs of byte images; without loops for
// these, which compilers turn back into calls.
inline FASTUFT_INLINE void copy_run(char* __restrict to, const char* __restrict from, int64_t size) {
  if (size >= kLine) {
    for (int64_t at = 0; at < size - kLine; at += kLine) {
      std::memcpy(to + at, from + at, kLine);
    }
    std::memcpy(to + size - kLine, from + size - kLine, kLine);
  } else if (size >= 32) {
    copy_ends<32>(to, from, size);
  } else if (size >= 16) {
    copy_ends<16>(to, from, size);
  } else if (size >= 8) {
    copy_ends<8>(to, from, size);
  } else if (size >= 4) {
    copy_ends<4>(to, from, size);
  } else if (size > 0) {
    to[0] = from[0];
    to[size / 2] = from[size / 2];
    to[size - 1] = from[size - 1];
  }
}

// The same with the whole cache lines of `to` stored past the cache, so that they are not read before they are written.
// Stores of this kind become visible to other threads by finish_streaming().
inline FASTUFT_INLINE void stream_run(char* __restrict to, const char* __restrict from, int64_t size) {
#ifdef FASTUFT_STREAMING_STORES
  int64_t at = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (size >= at + kLine) {
    copy_run(to, from, at);
    for (; at + kLine <= size; at += kLine) {
      for (int64_t part = at; part < at + kLine; part += sizeof(__m128i)) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + part),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
      }
    }
    to += at, from += at, size -= at;
  }
#endif
  copy_run(to, from, size);
}

inline void finish_streaming() {
#ifdef FASTUFT_STREAMING_STORES
  _mm_sfence();
#endif
}

// Whether an output is stored past the cache: one that would push out its input and its own beginning before anything
// reads it. Half of the 32 MB that a core of current servers reaches; what the system reports may be the sum over chiplets.
bool exceeds_cache(int64_t bytes) {
#ifdef FASTUFT_STREAMING_STORES
  return bytes > int64_t{16} << 20;
#else
  return bytes < 0;
#endif
}

// One sample of CutMix's output, written in memory order: runs of its own pixels and runs of the partner's alternate, so that
// each element is read and written once.
class Composition {
 public:
  Composition(char* to, const char* own, const char* other, const Region<int64_t>& all, const Region<int64_t>& box,
              int64_t itemsize)
      : to_(to), own_(own), other_(other), itemsize_(itemsize), run_(all.run * itemsize), boxed_run_(box.run * itemsize),
        cursor_(all.start * itemsize), rows_(all), boxed_(box) {}

  void fetch(int64_t begin, int64_t end) const {
    for (int64_t at = begin; at < end; at += kLine) {
      __builtin_prefetch(own_ + at);
    }
  }

  // Bytes up to `limit`, to the end of the run that begins before it.
  template <bool Stream>
  inline FASTUFT_INLINE void advance(int64_t limit) {
    while (!rows_.done()) {
      const int64_t end = rows_.start() * itemsize_ + run_;
      const int64_t stop = std::min(end, limit);
      while (!boxed_.done() && boxed_.start() * itemsize_ < stop) {
        const int64_t begin = boxed_.start() * itemsize_;
        copy<Stream>(own_, cursor_, begin);
        copy<Stream>(other_, begin, begin + boxed_run_);
        cursor_ = begin + boxed_run_;
        boxed_.advance();
      }
      if (cursor_ < stop) {
        copy<Stream>(own_, cursor_, stop);
        cursor_ = stop;
      }
      if (cursor_ < end) {
        return;
      }
      rows_.advance();
      cursor_ = rows_.start() * itemsize_;
    }
  }

 private:
  template <bool Stream>
  inline FASTUFT_INLINE void copy(const char* source, int64_t begin, int64_t end) {
    Stream ? stream_run(to_ + begin, source + begin, end - begin) : copy_run(to_ + begin, source + begin, end - begin);
  }

  char* to_;
  const char *own_, *other_;
  int64_t itemsize_, run_, boxed_run_, cursor_;
  RowWalk rows_, boxed_;
};

// Runs of `size` bytes that do not overlap.
FASTUFT_VECTORIZED void swap_run(char* __restrict a, char* __restrict b, int64_t size) {
  constexpr int64_t kWord = 16;
  int64_t at = 0;
  for (; at + kWord <= size; at += kWord) {
    char x[kWord], y[kWord];
    std::memcpy(x, a + at, kWord);
    std::memcpy(y, b + at, kWord);
    std::memcpy(a + at, y, kWord);
    std::memcpy(b + at, x, kWord);
  }
  for (; at < size; ++at) {
    std::swap(a[at], b[at]);
  }
}

void swap_regions(char* a, char* b, const Region<int64_t>& region, int64_t itemsize) {
  for (RowWalk rows(region); !rows.done(); rows.advance()) {
    swap_run(a + rows.start() * itemsize, b + rows.start() * itemsize, region.run * itemsize);
  }
}

// `bytes` of some samples side by side, a band of each in turn: what one reads of its partner, the partner reads from the
// cache. (Composed one after the other, they took a third longer on an AMD EPYC, all of it waiting for partners' rows.)
FASTUFT_VECTORIZED void compose(Composition* samples, int64_t count, int64_t bytes, bool stream) {
  for (int64_t limit = kBand; limit < bytes + kBand; limit += kBand) {
    for (int64_t i = 0; i < count; ++i) {
      samples[i].fetch(limit - kBand + kAhead, std::min(limit + kAhead, bytes));
    }
    for (int64_t i = 0; i < count; ++i) {
      stream ? samples[i].advance<true>(limit) : samples[i].advance<false>(limit);
    }
  }
  if (stream) {
    finish_streaming();
  }
}

// Every sample once, in groups of at most kTogether, each sample followed by its partner unless that came before: two that
// swap boxes are a group.
struct Groups {
  std::vector<int64_t> samples, begins;

  Groups(const int64_t* partner, int64_t batch) {
    samples.reserve(batch);
    std::vector<bool> taken(batch);
    for (int64_t first = 0; first < batch; ++first) {
      int64_t length = 0;
      for (int64_t i = first; !taken[i]; i = partner[i], ++length) {
        if (length % kTogether == 0) {
          begins.push_back(static_cast<int64_t>(samples.size()));
        }
        samples.push_back(i);
        taken[i] = true;
      }
    }
    begins.push_back(batch);
  }

  int64_t count() const { return static_cast<int64_t>(begins.size()) - 1; }
};

Tensor cutmix(const Tensor& given, const Tensor& boxes, const Tensor& partner) {
  const Tensor images = dense(given);
  const Layout layout = layout_of(images);
  check_companion(boxes, ScalarType::Int, 4 * layout.batch, "boxes");
  check_companion(partner, ScalarType::Long, layout.batch, "partner");
  const int32_t* box = boxes.const_data_ptr<int32_t>();
  const int64_t* other = partner.const_data_ptr<int64_t>();
  check_boxes(box, layout.batch, layout);
  check_partners(other, layout.batch);
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() == 0) {
    return out;
  }
  const int64_t itemsize = images.element_size();
  const int64_t sample = layout.batch_stride * itemsize;
  const char* source = static_cast<const char*>(images.const_data_ptr());
  char* target = static_cast<char*>(out.mutable_data_ptr());
  const Region<int64_t> all = region_of<int64_t>(layout, whole(layout));
  const bool stream = exceeds_cache(images.numel() * itemsize);
  const int64_t bytes = layout.extent() * itemsize;
  const Groups groups(other, layout.batch);
  torch::stable::parallel_for(0, groups.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<Composition> together;
    for (int64_t group = begin; group < end; ++group) {
      together.clear();
      for (int64_t at = groups.begins[group]; at < groups.begins[group + 1]; ++at) {
        const int64_t i = groups.samples[at];
        const Region<int64_t> region = region_of<int64_t>(layout, box_at(box, i));
        together.emplace_back(target + i * sample, source + i * sample, source + other[i] * sample, all, region,
                              itemsize);
      }
      compose(together.data(), static_cast<int64_t>(together.size()), bytes, stream);
    }
  });
  return out;
}

void cutmix_(Tensor images, const Tensor& boxes, int64_t group) {
  const Layout layout = layout_of(images);
  const Pairing pairing = pairing_of(layout, group);
  const int64_t pairs = pairing.pairs;
  check_companion(boxes, ScalarType::Int, 4 * pairs, "boxes");
  const int32_t* box = boxes.const_data_ptr<int32_t>();
  check_boxes(box, pairs, layout);
  if (images.numel() == 0) {
    return;
  }
  const int64_t itemsize = images.element_size();
  const int64_t sample = layout.batch_stride * itemsize;
  char* data = static_cast<char*>(images.mutable_data_ptr());
  torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Region<int64_t> region = region_of<int64_t>(layout, box_at(box, i));
      swap_regions(data + pairing.first(i) * sample, data + pairing.last(i) * sample, region, itemsize);
    }
  });
}

// lam x + (1 - lam) y in fp32 (fp64 for fp64), rounded once; bytes round half to even, as torch.round does.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline T blend(T x, T y, Compute<T> lam, Compute<T> rest) {
  const Compute<T> mixed = lam * static_cast<Compute<T>>(x) + rest * static_cast<Compute<T>>(y);
  if constexpr (std::is_same_v<T, uint8_t>) {
    // Adding 2^23 leaves no fraction bits, so the sum is rounded half to even; unlike a library call it vectorizes.
    constexpr float kNoFraction = 8388608.0f;
    return static_cast<uint8_t>(static_cast<int32_t>((mixed + kNoFraction) - kNoFraction));
  } else {
    return static_cast<T>(mixed);
  }
}

// A run of each dtype. (target_clones does not reach into templates.) `result` overlaps neither x nor y.
#define FASTUFT_BLEND_RUNS(T)                                                                                          \
  FASTUFT_VECTORIZED void blend_run(const T* __restrict x, const T* __restrict y, T* __restrict result, int64_t count, \
                                    Compute<T> lam, Compute<T> rest) {                                                 \
    for (int64_t e = 0; e < count; ++e) {                                                                              \
      result[e] = blend<T>(x[e], y[e], lam, rest);                                                                     \
    }                                                                                                                  \
  }                                                                                                                    \
  FASTUFT_VECTORIZED void blend_run_pair(T* __restrict x, T* __restrict y, int64_t count, Compute<T> lam,              \
                                         Compute<T> rest) {                                                            \
    for (int64_t e = 0; e < count; ++e) {                                                                              \
      const T first = x[e], last = y[e];                                                                               \
      x[e] = blend<T>(first, last, lam, rest);                                                                         \
      y[e] = blend<T>(last, first, lam, rest);                                                                         \
    }                                                                                                                  \
  }
FASTUFT_BLEND_RUNS(uint8_t)
FASTUFT_BLEND_RUNS(Half)
FASTUFT_BLEND_RUNS(BFloat16)
FASTUFT_BLEND_RUNS(float)
FASTUFT_BLEND_RUNS(double)
#undef FASTUFT_BLEND_RUNS

template <class T>
void mixup_samples(const Tensor& images, Tensor& out, const Layout& layout, const float* lam, const int64_t* other) {
  const Region<int64_t> all = region_of<int64_t>(layout, whole(layout));
  const T* source = static_cast<const T*>(images.const_data_ptr());
  T* target = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, layout.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Compute<T> weight = lam[i];
      const T* own = source + i * layout.batch_stride;
      const T* partner = source + other[i] * layout.batch_stride;
      T* result = target + i * layout.batch_stride;
      for (RowWalk rows(all); !rows.done(); rows.advance()) {
        const int64_t start = rows.start();
        blend_run(own + start, partner + start, result + start, all.run, weight, 1 - weight);
      }
    }
  });
}

template <class T>
void mixup_pairs(Tensor& images, const Layout& layout, const Pairing& pairing, const float* lam) {
  const Region<int64_t> all = region_of<int64_t>(layout, whole(layout));
  T* data = static_cast<T*>(images.mutable_data_ptr());
  torch::stable::parallel_for(0, pairing.pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Compute<T> weight = lam[i];
      T* first = data + pairing.first(i) * layout.batch_stride;
      T* last = data + pairing.last(i) * layout.batch_stride;
      for (RowWalk rows(all); !rows.done(); rows.advance()) {
        const int64_t start = rows.start();
        blend_run_pair(first + start, last + start, all.run, weight, 1 - weight);
      }
    }
  });
}

template <class Function>
void dispatch(ScalarType type, Function function) {
  switch (type) {
    case ScalarType::Byte:
      return function(uint8_t{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    default:
      STD_TORCH_CHECK(false, "images has a dtype that cannot be mixed");
  }
}

Tensor mixup(const Tensor& given, const Tensor& lam, const Tensor& partner) {
  const Tensor images = dense(given);
  const Layout layout = layout_of(images);
  check_companion(lam, ScalarType::Float, layout.batch, "lam");
  check_companion(partner, ScalarType::Long, layout.batch, "partner");
  const float* weights = lam.const_data_ptr<float>();
  const int64_t* other = partner.const_data_ptr<int64_t>();
  check_weights(weights, layout.batch);
  check_partners(other, layout.batch);
  Tensor out = torch::stable::empty_like(images);
  if (images.numel() > 0) {
    dispatch(images.scalar_type(),
             [&](auto zero) { mixup_samples<decltype(zero)>(images, out, layout, weights, other); });
  }
  return out;
}

void mixup_(Tensor images, const Tensor& lam, int64_t group) {
  const Layout layout = layout_of(images);
  const Pairing pairing = pairing_of(layout, group);
  check_companion(lam, ScalarType::Float, pairing.pairs, "lam");
  const float* weights = lam.const_data_ptr<float>();
  check_weights(weights, pairing.pairs);
  if (images.numel() > 0) {
    dispatch(images.scalar_type(), [&](auto zero) { mixup_pairs<decltype(zero)>(images, layout, pairing, weights); });
  }
}

}  // namespace
}  // namespace fastuft

STABLE_TORCH_LIBRARY_FRAGMENT(fastuft, m) {
  m.def("cutmix(Tensor images, Tensor boxes, Tensor partner) -> Tensor");
  m.def("cutmix_(Tensor(a!) images, Tensor boxes, int group=0) -> ()");
  m.def("mixup(Tensor images, Tensor lam, Tensor partner) -> Tensor");
  m.def("mixup_(Tensor(a!) images, Tensor lam, int group=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastuft, CPU, m) {
  m.impl("cutmix", TORCH_BOX(&fastuft::cutmix));
  m.impl("cutmix_", TORCH_BOX(&fastuft::cutmix_));
  m.impl("mixup", TORCH_BOX(&fastuft::mixup));
  m.impl("mixup_", TORCH_BOX(&fastuft::mixup_));
}
