// Memory access: 16-byte vectors, and conversions by hardware instruction where the device has one. The host
// compiler, under the emulation, takes the conversions of math/storage.h.
#pragma once

#include <cuda_runtime.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../math/storage.h"

namespace constrained_ops {

template <typename Storage>
constexpr int vector_length = 16 / static_cast<int>(sizeof(Storage));

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Two 16-bit numbers as one word, the first in the low half.
template <typename Storage>
__device__ __forceinline__ void unpack_pair(uint32_t word, float& first, float& second) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Storage, Half>) {
    const float2 pair = __half22float2(bit_cast<__half2>(word));
    first = pair.x;
    second = pair.y;
  } else {
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
  }
#else
  first = to_compute(Storage{static_cast<uint16_t>(word)});
  second = to_compute(Storage{static_cast<uint16_t>(word >> 16)});
#endif
}

template <typename Storage>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Storage, Half>) {
    return bit_cast<uint32_t>(__floats2half2_rn(first, second));
  } else {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(first, second));
  }
#else
  return to_storage<Storage>(first).bits | static_cast<uint32_t>(to_storage<Storage>(second).bits) << 16;
#endif
}

template <typename Storage>
__device__ __forceinline__ compute_t<Storage> load(const Storage* p) {
  if constexpr (sizeof(Storage) == 2) {
    float value, unused;
    unpack_pair<Storage>(__ldg(&p->bits), value, unused);
    return value;
  } else {
    return __ldg(p);
  }
}

template <typename Storage>
__device__ __forceinline__ void store(Storage* p, compute_t<Storage> value) {
  if constexpr (sizeof(Storage) == 2) {
    p->bits = static_cast<uint16_t>(pack_pair<Storage>(value, 0.0f));
  } else {
    *p = value;
  }
}

// 16 bytes as they lie in memory.
template <typename Storage>
struct Vector {
  static constexpr int length = vector_length<Storage>;
  using T = compute_t<Storage>;

  uint4 words;

  __device__ __forceinline__ void unpack(T* values) const {
    if constexpr (sizeof(Storage) == 2) {
      unpack_pair<Storage>(words.x, values[0], values[1]);
      unpack_pair<Storage>(words.y, values[2], values[3]);
      unpack_pair<Storage>(words.z, values[4], values[5]);
      unpack_pair<Storage>(words.w, values[6], values[7]);
    } else if constexpr (sizeof(Storage) == 4) {
      values[0] = bit_cast<float>(words.x);
      values[1] = bit_cast<float>(words.y);
      values[2] = bit_cast<float>(words.z);
      values[3] = bit_cast<float>(words.w);
    } else {
      values[0] = bit_cast<double>(words.x | static_cast<uint64_t>(words.y) << 32);
      values[1] = bit_cast<double>(words.z | static_cast<uint64_t>(words.w) << 32);
    }
  }

  __device__ __forceinline__ static Vector pack(const T* values) {
    if constexpr (sizeof(Storage) == 2) {
      return {{pack_pair<Storage>(values[0], values[1]), pack_pair<Storage>(values[2], values[3]),
               pack_pair<Storage>(values[4], values[5]), pack_pair<Storage>(values[6], values[7])}};
    } else if constexpr (sizeof(Storage) == 4) {
      return {{bit_cast<uint32_t>(values[0]), bit_cast<uint32_t>(values[1]), bit_cast<uint32_t>(values[2]),
               bit_cast<uint32_t>(values[3])}};
    } else {
      const uint64_t first = bit_cast<uint64_t>(values[0]), second = bit_cast<uint64_t>(values[1]);
      return {{static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), static_cast<uint32_t>(second),
               static_cast<uint32_t>(second >> 32)}};
    }
  }
};

// All of a vector; p is a multiple of 16.
template <typename Storage>
__device__ __forceinline__ Vector<Storage> load_vector(const Storage* p) {
  return {__ldg(reinterpret_cast<const uint4*>(p))};
}

// The first `count` numbers of a vector, which may be none or more than it holds; zeros after them.
template <typename Storage>
__device__ __forceinline__ Vector<Storage> load_vector(const Storage* p, int64_t count) {
  if (count >= vector_length<Storage>) return load_vector(p);
  compute_t<Storage> values[vector_length<Storage>] = {};
#pragma unroll
  for (int i = 0; i < vector_length<Storage>; ++i) {
    if (i < count) values[i] = load(p + i);
  }
  return Vector<Storage>::pack(values);
}

// N numbers, a multiple of a vector; p is a multiple of 16.
template <int N, typename Storage>
__device__ __forceinline__ void store_vectors(Storage* p, const compute_t<Storage>* values) {
#pragma unroll
  for (int i = 0; i < N; i += vector_length<Storage>) {
    *reinterpret_cast<uint4*>(p + i) = Vector<Storage>::pack(values + i).words;
  }
}

// The first `count` of N numbers, which may be none or more than N.
template <int N, typename Storage>
__device__ __forceinline__ void store_vectors(Storage* p, const compute_t<Storage>* values, int64_t count) {
  if (count >= N) return store_vectors<N>(p, values);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) store(p + i, values[i]);
  }
}

}  // namespace constrained_ops
