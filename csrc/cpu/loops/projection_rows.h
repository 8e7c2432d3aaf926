// The projection of several rows at once that follow each other in memory. Few elements of a row are near enough to its
// largest to be of the support: those are gathered, side by side with those of the other rows, and lambda found for
// them alone.
#pragma once

#include "projection_steps.h"
#include "transpose.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include <array>
#endif

namespace constrained_ops::CO_LEVEL {
namespace {

// Writes those of `values` that are inside, one after the other; may write a whole vector. Returns how many they are.
template <typename T, typename Mask>
CO_HD int64_t compress(Vector<T> values, Mask inside, T* to) {
  int64_t count = 0;
  for (int l = 0; l < width<T>; ++l) {
    to[count] = values[l];
    count -= inside[l];
  }
  return count;
}

#if defined(__AVX512F__)
template <typename Mask>
CO_HD int64_t compress(Vector<float> values, Mask inside, float* to) {
  const __mmask16 set = _mm512_movepi32_mask(reinterpret_cast<__m512i>(inside));
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(set, reinterpret_cast<__m512>(values)));
  return __builtin_popcount(set);
}
template <typename Mask>
CO_HD int64_t compress(Vector<double> values, Mask inside, double* to) {
  const __mmask8 set = _mm512_movepi64_mask(reinterpret_cast<__m512i>(inside));
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(set, reinterpret_cast<__m512d>(values)));
  return __builtin_popcount(set);
}
#elif defined(__AVX2__)
// For each set of lanes their numbers in order, a byte each.
constexpr std::array<uint64_t, 256> lanes_of_set = [] {
  std::array<uint64_t, 256> numbers{};
  for (int set = 0; set < 256; ++set)
    for (uint64_t lane = 0, at = 0; lane < 8; ++lane)
      if (set >> lane & 1) numbers[set] |= lane << 8 * at++;
  return numbers;
}();

template <typename Mask>
CO_HD int64_t compress(Vector<float> values, Mask inside, float* to) {
  const int set = _mm256_movemask_ps(reinterpret_cast<__m256>(inside));
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes_of_set[set])));
  _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(values, lanes));
  return __builtin_popcount(set);
}
#endif

template <bool weighted, typename T>
class RowsProjection {
  using V = Vector<T>;
  static constexpr int64_t lanes = RowUnits::lanes;
  static constexpr T infinity = std::numeric_limits<T>::infinity();

 public:
  static constexpr int64_t shortest = width<T>;

  explicit RowsProjection(int64_t length)
      : length_(length),
        stride_(length + width<T> + 8),
        scratch_(length),
        memory_(new T[operands * 2 * lanes * stride_]) {}

  // Up to RowUnits::lanes rows, of at least `shortest` elements; y must lie elsewhere than x and weight.
  void operator()(int64_t rows, const T* x, const T* weight, T* y, T total) {
    const int64_t length = length_;
    Ascent<T> first[lanes];
    for (int64_t r = 0; r < rows; ++r) {
      V top[2] = {V{} - infinity, V{} - infinity};
      for_each_vector(length, [&](int64_t k, int v, int) CO_INLINE {
        V x_k = load(x + r * length + k), u_k = read_weight(weight, r * length + k);
        top[v] = larger_of(top[v], projection_bound<weighted>(x_k, u_k, total));
      });
      first[r] = Ascent<T>::template from<weighted>(across<T, T>(larger_of(top[0], top[1]), Larger()), total);
    }

    int64_t counts[lanes] = {}, height = 1;
    for (int64_t r = 0; r < rows; ++r) {
      const Ascent<V> at = {V{} + first[r].anchor, V{} + first[r].high, V{}, V{}, V{}};
      T *to = kept(0) + r * stride_, *to_weight = kept(1) + r * stride_;
      int64_t count = 0;
      for_each_vector(length, [&](int64_t k, int, int fresh) CO_INLINE {
        const V x_k = load(x + r * length + k), weight_k = read_weight(weight, r * length + k);
        V u_k = weight_k;
        auto inside = ~(rest_at<weighted>(at, total, x_k, u_k) <= T(0));  // a NaN, too
        if (fresh) inside &= lane_numbers() >= V{} + T(fresh);
        if (weighted) compress(weight_k, inside, to_weight + count);
        count += compress(x_k, inside, to + count);
      });
      counts[r] = count;
      height = std::max(height, count);
    }
    if (length >= shortest_alone && 2 * height > length) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = r * length;
        project_row<weighted>(length, x + i, weighted ? weight + i : nullptr, y + i, total, scratch_);
      }
      return;
    }
    for (int64_t r = 0; r < lanes; ++r) {
      std::fill(kept(0) + r * stride_ + counts[r], kept(0) + r * stride_ + height, -infinity);
      if (weighted) std::fill(kept(1) + r * stride_ + counts[r], kept(1) + r * stride_ + height, T(1));
    }
    const int64_t columns = (height + 7) / 8 * 8;  // whole squares; what is too much is not looked at
    for (int i = 0; i < operands; ++i) transpose(kept(i), stride_, tile(i), lanes, lanes, columns);

    T anchor[lanes], high[lanes], low[lanes];
    for (int64_t l = 0; l < rows; l += group<T>) {
      ProjectionBlocks<false, T> blocks(height, lanes, {tile(0) + l, tile(operands - 1) + l}, {nullptr}, {});
      Ascent<V> at[2];
      start_ascent<weighted, false>(blocks, total, at);
      ascend<weighted, false>(blocks, total, scratch_.live(), at);
      for (int v = 0; v < 2; ++v) {
        store(anchor + l + v * width<T>, at[v].anchor);
        store(high + l + v * width<T>, at[v].high);
        store(low + l + v * width<T>, at[v].low);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Ascent<V> at = {V{} + anchor[r], V{} + high[r], V{} + low[r], V{}, V{}};
      for_each_vector(length, [&](int64_t k, int, int) CO_INLINE {
        V u_k = read_weight(weight, r * length + k);
        const V rest = rest_at<weighted>(at, total, load(x + r * length + k), u_k);
        store(y + r * length + k, value_of_rest(rest));
      });
    }
  }

 private:
  static constexpr int operands = 1 + weighted;

  T* kept(int operand) { return memory_.get() + operand * lanes * stride_; }
  T* tile(int operand) { return memory_.get() + (operands + operand) * lanes * stride_; }

  static V lane_numbers() {
    V numbers;
    for (int l = 0; l < width<T>; ++l) numbers[l] = T(l);
    return numbers;
  }
  static CO_HD V read_weight(const T* weight, int64_t i) { return weighted ? load(weight + i) : V{} + T(1); }

  // body(first element, 0 or 1 in turns, how many of the elements were in the vector before): all of a row.
  template <typename Body>
  static CO_HD void for_each_vector(int64_t length, const Body& body) {
    int64_t k = 0;
    for (; k + group<T> <= length; k += group<T>) {
      body(k, 0, 0);
      body(k + width<T>, 1, 0);
    }
    if (k + width<T> <= length) {
      body(k, 0, 0);
      k += width<T>;
    }
    if (k < length) body(length - width<T>, 1, static_cast<int>(width<T> - (length - k)));
  }

  const int64_t length_, stride_;
  ProjectionScratch scratch_;
  const std::unique_ptr<T[]> memory_;
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
