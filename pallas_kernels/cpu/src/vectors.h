// Vectors of 32-bit numbers as wide as the registers of the instruction set that the including file is compiled for.
//
// GCC's vector extensions, which Clang has too, do most of the work, so one source serves AVX-512, AVX2, NEON and
// whatever else: W lanes are a register each. Everything lies in a namespace named by the macro ISA, so that the copies
// for several instruction sets live in one library.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fineserve::ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t Words __attribute__((vector_size(2 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

#define INLINE inline __attribute__((always_inline))

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class V, class T>
INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

template <class To, class From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits of as many bytes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

INLINE F splat(float x) { return F{} + x; }
INLINE F floats(I v) { return __builtin_convertvector(v, F); }
INLINE F floats(U v) { return __builtin_convertvector(bits<I>(v), F); }  // of numbers below 2**31

// 16-bit words, each in a lane.
INLINE U widen(const uint16_t* from) {
#if defined(__AVX512F__)
  return bits<U>(_mm512_cvtepu16_epi32(load<__m256i>(from)));
#elif defined(__AVX2__)
  return bits<U>(_mm256_cvtepu16_epi32(load<__m128i>(from)));
#else
  return __builtin_convertvector(load<Words>(from), U);
#endif
}

INLINE U widen(const uint8_t* from) {
#if defined(__AVX512F__)
  return bits<U>(_mm512_cvtepu8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
  return bits<U>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<Bytes>(from), U);
#endif
}

// NaN, which compares as false, stays in the first argument.
INLINE F at_least(F x, float least) { return x < least ? splat(least) : x; }
INLINE F larger(F a, F b) { return a > b ? a : b; }

INLINE float largest(F v) {
  float x = v[0];
  for (int i = 1; i < W; ++i) x = v[i] > x ? v[i] : x;
  return x;
}

// -- single numbers ---------------------------------------------------------------------------------------------------

INLINE float bf16(uint16_t word) { return bits<float>(static_cast<uint32_t>(word) << 16); }

// The nearest bf16, ties to even; NaN stays NaN.
INLINE uint16_t to_bf16(float x) {
  const uint32_t b = bits<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>(b >> 16 | 0x40);
  return static_cast<uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}

INLINE float fp16(uint16_t word) {
  const uint32_t magnitude = word & 0x7FFFu, sign = (word & 0x8000u) << 16;
  uint32_t b;
  if (magnitude < 1u << 10) {
    b = bits<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  } else if (magnitude < 31u << 10) {
    b = (magnitude << 13) + (112u << 23);
  } else {
    b = magnitude << 13 | 0xFFu << 23;
  }
  return bits<float>(b | sign);
}

// -- vectors of other floats ------------------------------------------------------------------------------------------

INLINE F bf16(U words) { return bits<F>(words << 16); }

// Rounded to bf16, ties to even. Not for NaN.
INLINE F rounded_to_bf16(F x) {
  const U b = bits<U>(x);
  return bits<F>((b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000u);
}

INLINE F to_bf16_and_back(F x) { return x == x ? rounded_to_bf16(x) : x; }

INLINE F fp16(U words) {
#if defined(__AVX512F__)
  return bits<F>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits<__m512i>(words))));
#else
  const U magnitude = words & 0x7FFF;
  const U subnormal = bits<U>(floats(magnitude) * 0x1p-24f);
  const U normal = (magnitude << 13) + (112u << 23), infinite = magnitude << 13 | 0xFFu << 23;
  const U found = magnitude < 1u << 10 ? subnormal : magnitude < 31u << 10 ? normal : infinite;
  return bits<F>(found | (words & 0x8000) << 16);
#endif
}

// e4m3 numbers, codes in the lowest 8 bits: by way of fp16, whose exponent reaches 8 higher.
INLINE F e4m3(U codes) {
  const U magnitude = codes & 0x7F;
#if defined(__AVX512F__)
  return fp16(magnitude << 7 | (codes & 0x80) << 8) * 256.0f;
#else
  const U found = magnitude < 8 ? bits<U>(floats(magnitude) * 0x1p-9f) : (magnitude << 20) + (120u << 23);
  return bits<F>(found | (codes & 0x80) << 24);
#endif
}

INLINE float e4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7F;
  const uint32_t found =
      magnitude < 8 ? bits<uint32_t>(static_cast<float>(magnitude) * 0x1p-9f) : (magnitude << 20) + (120u << 23);
  return bits<float>(found | (code & 0x80) << 24);
}

// -- functions --------------------------------------------------------------------------------------------------------

// exp of numbers up to 88, to within 2 units in the last place; NaN stays. Cody and Waite's reduction: exp(x) = 2**n *
// exp(r), r = x - n * log 2 in two pieces, and the Taylor series of exp(r) for |r| <= log(2) / 2.
INLINE F exp(F x) {
  x = at_least(x, -87.0f);
  const F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2**23: rounds to an integer, which the lowest bits hold
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits<F>((bits<I>(shifted) << 23) + (127 << 23));
}

// tanh: near 0 by its Taylor series up to x**15, elsewhere by exp.
INLINE F tanh(F x) {
  const F z = x * x, absolute = x < 0.0f ? -x : x;
  F s = splat(-929569.0f / 638512875);
  s = s * z + 21844.0f / 6081075;
  s = s * z + -1382.0f / 155925;
  s = s * z + 62.0f / 2835;
  s = s * z + -17.0f / 315;
  s = s * z + 2.0f / 15;
  s = s * z + -1.0f / 3;
  const F small = x + x * z * s;
  const F bounded = absolute > 40.0f ? splat(40.0f) : absolute;
  const F large = 1.0f - 2.0f / (exp(2.0f * bounded) + 1.0f);
  return absolute < 0.5f ? small : x < 0.0f ? -large : x > 0.0f ? large : x;
}

// -- sums and transposes ----------------------------------------------------------------------------------------------

// Of two vectors in blocks of S lanes, the even blocks, or the odd ones: a's at the even places, b's at the odd ones.
template <int S, int ODD, class V, int... L>
INLINE V blocks(V a, V b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (L / (2 * S) * 2 * S + L % S + ODD * S + (L % (2 * S) < S ? 0 : W))...);
}

template <int S, int ODD, class V>
INLINE V blocks(V a, V b) {
  return blocks<S, ODD>(a, b, std::make_integer_sequence<int, W>{});
}

// Of two vectors, one behind the other, the lanes at even places, or at odd ones.
template <int ODD, int... L>
INLINE F every_other(F a, F b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, (2 * L + ODD)...);
}

template <int ODD>
INLINE F every_other(F a, F b) {
  return every_other<ODD>(a, b, std::make_integer_sequence<int, W>{});
}

// Lane i is the sum of the lanes of v[i].
template <int S = W / 2, class V>
INLINE V sums(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < S; ++i) v[i] = blocks<S, 0>(v[i], v[i + S]) + blocks<S, 1>(v[i], v[i + S]);
  if constexpr (S > 1) return sums<S / 2>(v);
  return v[0];
}

// A matrix of W rows, transposed.
template <int S = W / 2>
INLINE void transpose(F* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const F even = blocks<S, 0>(v[i], v[i + S]), odd = blocks<S, 1>(v[i], v[i + S]);
    v[i] = even, v[i + S] = odd;
  }
  if constexpr (S > 1) transpose<S / 2>(v);
}

INLINE float sum(F v) {
  float x = 0;
  for (int i = 0; i < W; ++i) x += v[i];
  return x;
}

}  // namespace fineserve::ISA
