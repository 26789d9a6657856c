// How weights and activations of each kind are read, multiplied and summed, a vector at a time, as `models.weight_formats`
// says: bf16 by bf16 with sums in f32, or integers with sums in i32.
//
// `add_words` adds the products of a vector of weights of a panel (see panels.h) with a 32-bit word of activations.
#pragma once

#include "interface.h"
#include "vectors.h"

namespace fineserve::ISA {

// -- bf16 -------------------------------------------------------------------------------------------------------------

struct BFloat16Kind {
  using Weight = uint16_t;
  using Sum = F;
  static constexpr int64_t kChunk = 2 * W;  // weights of a vector
  static constexpr int64_t kLeastPanelRows = 8;  // for fewer rows, laying out a panel costs more than it saves
#if defined(__AVX512BF16__)
  using Activation = uint16_t;
  using Vector = __m512bh;

  INLINE static Vector read(const Weight* from) { return bits<Vector>(load<__m512i>(from)); }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum = bits<F>(_mm512_dpbf16_ps(bits<__m512>(sum), w, bits<Vector>(load<__m512i>(x))));
  }
  INLINE static void prepare_chunk(const float* x, Activation* to) {
    store(to, _mm512_cvtne2ps_pbh(load<__m512>(x + W), load<__m512>(x)));
  }
  INLINE static void add_words(Sum& sum, F w, U word) {
    sum = bits<F>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<Vector>(w), bits<Vector>(word)));
  }
#else
  using Activation = float;  // of a chunk those at even places, then those at odd ones
  struct Vector {
    F even, odd;
  };

  INLINE static Vector read(const Weight* from) {
    const U pairs = load<U>(from);
    return {bits<F>(pairs << 16), bits<F>(pairs & 0xFFFF0000u)};
  }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum += w.even * load<F>(x);
    sum += w.odd * load<F>(x + W);
  }
  INLINE static void prepare_chunk(const float* x, Activation* to) {
    const F first = to_bf16_and_back(load<F>(x)), second = to_bf16_and_back(load<F>(x + W));
    store(to, every_other<0>(first, second));
    store(to + W, every_other<1>(first, second));
  }
  INLINE static void add_words(Sum& sum, F w, U word) { sum += w * bits<F>(word); }
#endif
};

// 4-bit weights, which are decoded to bf16 before: laying them out is one more pass.
struct Int4Kind : BFloat16Kind {
  static constexpr int64_t kLeastPanelRows = 256;
};

// -- int8 -------------------------------------------------------------------------------------------------------------

struct Int8Kind {
  using Weight = int8_t;
  using Sum = I;
  static constexpr int64_t kLeastPanelRows = 8;
#if defined(__AVX512VNNI__)
  // Bytes with sign times bytes without: weights are moved by 128, and 128 times the activations' sum is taken off.
  using Activation = int8_t;
  using Vector = __m512i;
  static constexpr int64_t kChunk = 4 * W;
  static constexpr int32_t kMoved = 128;

  INLINE static Vector read(const Weight* from) {
    return _mm512_xor_si512(load<__m512i>(from), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum = bits<I>(_mm512_dpbusd_epi32(bits<__m512i>(sum), w, load<__m512i>(x)));
  }
  INLINE static void add_words(Sum& sum, F w, U word) {
    sum = bits<I>(_mm512_dpbusd_epi32(bits<__m512i>(sum), bits<__m512i>(w), bits<__m512i>(word)));
  }
#else
  using Activation = int16_t;
  static constexpr int32_t kMoved = 0;
#if defined(__AVX512BW__)
  using Vector = __m512i;
  static constexpr int64_t kChunk = 2 * W;
  INLINE static Vector read(const Weight* from) { return _mm512_cvtepi8_epi16(load<__m256i>(from)); }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum += bits<I>(_mm512_madd_epi16(w, load<__m512i>(x)));
  }
  INLINE static void add_words(Sum& sum, F w, U word) {
    sum += bits<I>(_mm512_madd_epi16(bits<__m512i>(w), bits<__m512i>(word)));
  }
#elif defined(__AVX2__)
  using Vector = __m256i;
  static constexpr int64_t kChunk = 2 * W;
  INLINE static Vector read(const Weight* from) { return _mm256_cvtepi8_epi16(load<__m128i>(from)); }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum += bits<I>(_mm256_madd_epi16(w, load<__m256i>(x)));
  }
  INLINE static void add_words(Sum& sum, F w, U word) {
    sum += bits<I>(_mm256_madd_epi16(bits<__m256i>(w), bits<__m256i>(word)));
  }
#elif defined(__SSE2__)
  using Vector = __m128i;
  static constexpr int64_t kChunk = 2 * W;
  INLINE static Vector read(const Weight* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
  }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum += bits<I>(_mm_madd_epi16(w, load<__m128i>(x)));
  }
#else
  typedef int16_t Shorts __attribute__((vector_size(2 * W)));
  typedef int8_t SignedBytes __attribute__((vector_size(W)));
  using Vector = Shorts;
  static constexpr int64_t kChunk = W;
  INLINE static Vector read(const Weight* from) { return __builtin_convertvector(load<SignedBytes>(from), Shorts); }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum += __builtin_convertvector(w, I) * __builtin_convertvector(load<Shorts>(x), I);
  }
#endif
#endif
};

template <class Kind>
INLINE typename Kind::Vector read_some(const typename Kind::Weight* from, int64_t count) {
  typename Kind::Weight padded[Kind::kChunk] = {};
  std::memcpy(padded, from, count * sizeof *from);
  return Kind::read(padded);
}

}  // namespace fineserve::ISA
