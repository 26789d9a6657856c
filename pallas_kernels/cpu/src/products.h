// Products of few activations with matrices [out, inner]: each weight is read from memory once, in the layout in which XLA
// multiplies it too, whatever the number of rows.
//
// A tile is W sums, of R rows by W / R outputs; each is a vector of partial sums along `inner`, and in the end all W are
// added up across lanes at once. Weights and activations are multiplied as `models.weight_formats` says: bf16 by bf16 with
// sums in f32, or integers with sums in i32.
#pragma once

#include "interface.h"
#include "vectors.h"

namespace fineserve::ISA {

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// -- bf16 -------------------------------------------------------------------------------------------------------------

struct BFloat16Kind {
  using Weight = uint16_t;
  using Sum = F;
  static constexpr int64_t kChunk = 2 * W;  // weights of a vector
#if defined(__AVX512BF16__)
  using Activation = uint16_t;
  using Vector = __m512bh;

  INLINE static Vector read(const Weight* from) { return bits<Vector>(load<__m512i>(from)); }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum = bits<F>(_mm512_dpbf16_ps(bits<__m512>(sum), w, bits<Vector>(load<__m512i>(x))));
  }
  INLINE static void prepare_chunk(const float* x, int64_t count, Activation* to) {
    for (int64_t i = 0; i < kChunk; ++i) to[i] = i < count ? to_bf16(x[i]) : 0;
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
  INLINE static void prepare_chunk(const float* x, int64_t count, Activation* to) {
    for (int64_t i = 0; i < kChunk; ++i) to[i % 2 * W + i / 2] = i < count ? bf16(to_bf16(x[i])) : 0.0f;
  }
#endif
};

// -- int8 -------------------------------------------------------------------------------------------------------------

// What a row of activations was divided by, and what its sums have to start with.
struct RowScale {
  float scale;
  int32_t start;
};

struct Int8Kind {
  using Weight = int8_t;
  using Sum = I;
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
#elif defined(__AVX2__)
  using Vector = __m256i;
  static constexpr int64_t kChunk = 2 * W;
  INLINE static Vector read(const Weight* from) { return _mm256_cvtepi8_epi16(load<__m128i>(from)); }
  INLINE static void add(Sum& sum, const Vector& w, const Activation* x) {
    sum += bits<I>(_mm256_madd_epi16(w, load<__m256i>(x)));
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

// -- tiles ------------------------------------------------------------------------------------------------------------

template <class Kind>
INLINE typename Kind::Vector read_some(const typename Kind::Weight* from, int64_t count) {
  typename Kind::Weight padded[Kind::kChunk] = {};
  std::memcpy(padded, from, count * sizeof *from);
  return Kind::read(padded);
}

// Sums of R rows by C outputs, in lane r * C + c. Rows of weights are `inner` apart, of activations `length`.
template <class Kind, int R, int C>
INLINE typename Kind::Sum tile(const typename Kind::Weight* weights, int64_t inner, const typename Kind::Activation* x,
                               int64_t length) {
  static_assert(R * C <= W, "a sum in each lane");
  typename Kind::Sum found[W] = {};
  int64_t i = 0;
  for (; i + Kind::kChunk <= inner; i += Kind::kChunk) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const auto w = Kind::read(weights + c * inner + i);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) Kind::add(found[r * C + c], w, x + r * length + i);
    }
  }
  if (i < inner) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const auto w = read_some<Kind>(weights + c * inner + i, inner - i);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) Kind::add(found[r * C + c], w, x + r * length + i);
    }
  }
  return sums(found);
}

// W outputs, or fewer at the matrix's end, of R rows; `finish(r, c, sums)` takes a tile's.
template <class Kind, int R, class Finish>
INLINE void multiply_rows(const typename Kind::Weight* weights, int64_t inner, int64_t outputs,
                          const typename Kind::Activation* x, int64_t length, Finish finish) {
  constexpr int C = W / R;
  int64_t c = 0;
  for (; c + C <= outputs; c += C) finish(c, C, tile<Kind, R, C>(weights + c * inner, inner, x, length));
  for (; c < outputs; ++c) finish(c, 1, tile<Kind, R, 1>(weights + c * inner, inner, x, length));
}

// W outputs of all rows. `finish(first row, rows, output, outputs, sums)`.
template <class Kind, class Finish>
INLINE void multiply_outputs(const typename Kind::Weight* weights, int64_t inner, int64_t outputs,
                             const typename Kind::Activation* x, int64_t rows, Finish finish) {
  const int64_t length = round_up(inner, Kind::kChunk);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    multiply_rows<Kind, 4>(weights, inner, outputs, x + r * length, length,
                           [&](int64_t c, int64_t count, auto found) { finish(r, 4, c, count, found); });
  }
  if (r + 2 <= rows) {
    multiply_rows<Kind, 2>(weights, inner, outputs, x + r * length, length,
                           [&](int64_t c, int64_t count, auto found) { finish(r, 2, c, count, found); });
    r += 2;
  }
  if (r < rows) {
    multiply_rows<Kind, 1>(weights, inner, outputs, x + r * length, length,
                           [&](int64_t c, int64_t count, auto found) { finish(r, 1, c, count, found); });
  }
}

// -- activations ------------------------------------------------------------------------------------------------------

inline int64_t bf16_prepared_bytes(int64_t rows, int64_t inner) {
  return rows * round_up(inner, BFloat16Kind::kChunk) * sizeof(BFloat16Kind::Activation);
}

inline void bf16_prepare(const float* x, int64_t rows, int64_t inner, void* prepared) {
  auto* to = static_cast<BFloat16Kind::Activation*>(prepared);
  for (int64_t r = 0; r < rows; ++r, x += inner) {
    for (int64_t i = 0; i < inner; i += BFloat16Kind::kChunk, to += BFloat16Kind::kChunk) {
      const int64_t left = inner - i;
      if (left >= BFloat16Kind::kChunk) {
        BFloat16Kind::prepare_chunk(x + i, BFloat16Kind::kChunk, to);
      } else {
        BFloat16Kind::prepare_chunk(x + i, left, to);
      }
    }
  }
}

// Scales of all rows, then their codes.
inline int64_t int8_prepared_bytes(int64_t rows, int64_t inner) {
  return rows * (sizeof(RowScale) + round_up(inner, Int8Kind::kChunk) * sizeof(Int8Kind::Activation));
}

INLINE const Int8Kind::Activation* int8_codes(const void* prepared, int64_t rows) {
  return reinterpret_cast<const Int8Kind::Activation*>(static_cast<const RowScale*>(prepared) + rows);
}

// Codes as `Int8Weights.dot` has them: the nearest to x * (127 / largest), ties to even.
inline void int8_prepare(const float* x, int64_t rows, int64_t inner, void* prepared) {
  auto* scales = static_cast<RowScale*>(prepared);
  auto* to = reinterpret_cast<Int8Kind::Activation*>(scales + rows);
  const int64_t length = round_up(inner, Int8Kind::kChunk);
  for (int64_t r = 0; r < rows; ++r, x += inner, to += length) {
    F top_lanes{};
    int64_t i = 0;
    for (; i + W <= inner; i += W) {
      const F own = load<F>(x + i), absolute = bits<F>(bits<U>(own) & 0x7FFFFFFFu);
      top_lanes = larger(absolute, top_lanes);
    }
    float top = largest(top_lanes);
    for (; i < inner; ++i) {
      const float absolute = x[i] < 0 ? -x[i] : x[i];
      top = absolute > top ? absolute : top;
    }
    top = top > 1e-30f ? top : 1e-30f;
    const float factor = 127.0f / top;
    const float shift = 12582912.0f;  // 1.5 * 2**23: what is added to it is rounded to an integer
    int32_t sum = 0;
    bool finite = true;
    for (i = 0; i < inner; ++i) {
      const float scaled = x[i] * factor;
      finite &= scaled - scaled == 0.0f;
      const float bounded = scaled < -127.0f ? -127.0f : scaled > 127.0f ? 127.0f : scaled;
      const int32_t code = bits<int32_t>(bounded + shift) - bits<int32_t>(shift);
      to[i] = static_cast<Int8Kind::Activation>(code);
      sum += code;
    }
    for (; i < length; ++i) to[i] = 0;
    scales[r] = {finite ? top / 127.0f : __builtin_nanf(""), -Int8Kind::kMoved * sum};
  }
}

// -- outputs ----------------------------------------------------------------------------------------------------------

template <class V, class T>
INLINE void store_tile(T* y, int64_t out, int64_t r0, int64_t rows, int64_t c0, int64_t count, V found) {
  T lanes[W];
  store(lanes, found);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(y + (r0 + r) * out + c0, lanes + r * count, count * sizeof(T));
}

inline void bf16_multiply(const Products& p, int64_t first, int64_t last, void*) {
  const auto* weights = static_cast<const uint16_t*>(p.kernel);
  const auto* x = static_cast<const BFloat16Kind::Activation*>(p.prepared);
  for (int64_t o = first; o < last; o += W) {
    const int64_t outputs = last - o < W ? last - o : W;
    multiply_outputs<BFloat16Kind>(weights + o * p.inner, p.inner, outputs, x, p.rows,
                                   [&](int64_t r, int64_t rows, int64_t c, int64_t count, F found) {
                                     store_tile(p.y, p.out, r, rows, o + c, count, found);
                                   });
  }
}

inline void int8_multiply(const Products& p, int64_t first, int64_t last, void*) {
  const auto* weights = static_cast<const int8_t*>(p.kernel);
  const auto* of_outputs = static_cast<const float*>(p.scale);
  const auto* of_rows = static_cast<const RowScale*>(p.prepared);
  const auto* x = int8_codes(p.prepared, p.rows);
  for (int64_t o = first; o < last; o += W) {
    const int64_t outputs = last - o < W ? last - o : W;
    multiply_outputs<Int8Kind>(weights + o * p.inner, p.inner, outputs, x, p.rows,
                               [&](int64_t r, int64_t rows, int64_t c, int64_t count, I found) {
                                 int32_t lanes[W];
                                 store(lanes, found);
                                 for (int64_t i = 0; i < rows; ++i) {
                                   const RowScale own = of_rows[r + i];
                                   for (int64_t j = 0; j < count; ++j) {
                                     const auto whole = static_cast<float>(lanes[i * count + j] + own.start);
                                     p.y[(r + i) * p.out + o + c + j] = whole * own.scale * of_outputs[o + c + j];
                                   }
                                 }
                               });
  }
}

// -- int4 -------------------------------------------------------------------------------------------------------------

constexpr int64_t kGroup = 32;  // `weight_formats.INT4_GROUP`

// A group's 32 values of each plane, rounded to bf16: from bytes whose low halves are the codes of one, the high of other.
INLINE void decode_groups(const uint8_t* bytes, const float* scales, const float* minima, uint16_t* low,
                          uint16_t* high) {
#if defined(__AVX512BF16__)
  // The 16 numbers that a group has, twice, and codes look them up: bit 4 of an index makes no difference.
  const F codes = bits<F>(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i words = _mm512_cvtepu8_epi16(load<__m256i>(bytes));
  const __m512i places[2] = {words, _mm512_srli_epi16(words, 4)};
  uint16_t* to[2] = {low, high};
#pragma GCC unroll 2
  for (int plane = 0; plane < 2; ++plane) {
    const F numbers = codes * scales[plane] + minima[plane];
    const __m512i table = _mm512_broadcast_i64x4(bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(numbers))));
    store(to[plane], _mm512_permutexvar_epi16(places[plane], table));
  }
#else
  for (int64_t i = 0; i < kGroup; i += W) {
    const U codes = widen(bytes + i);
    const F one = floats(codes & 0xF) * scales[0] + minima[0], other = floats(codes >> 4) * scales[1] + minima[1];
    store(low + i, __builtin_convertvector(bits<U>(rounded_to_bf16(one)) >> 16, Words));
    store(high + i, __builtin_convertvector(bits<U>(rounded_to_bf16(other)) >> 16, Words));
  }
#endif
}

// `to` bf16[outputs, inner], of outputs from `o` on.
INLINE void decode_outputs(const Products& p, int64_t o, int64_t outputs, uint16_t* to) {
  const int64_t half = p.inner / 2, groups = p.inner / kGroup, groups_of_half = groups / 2;
  for (int64_t c = 0; c < outputs; ++c, to += p.inner) {
    const auto* bytes = static_cast<const uint8_t*>(p.kernel) + (o + c) * half;
    const auto* scale_words = static_cast<const uint16_t*>(p.scale) + (o + c) * groups;
    const auto* minimum_words = static_cast<const uint16_t*>(p.minimum) + (o + c) * groups;
    for (int64_t g = 0; g < groups_of_half; g += W) {
      float scales[W][2], minima[W][2];
      const int64_t count = groups_of_half - g < W ? groups_of_half - g : W;
      if (count == W) {
        for (int plane = 0; plane < 2; ++plane) {
          const F s = fp16(widen(scale_words + plane * groups_of_half + g));
          const F m = fp16(widen(minimum_words + plane * groups_of_half + g));
          for (int i = 0; i < W; ++i) scales[i][plane] = s[i], minima[i][plane] = m[i];
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          for (int plane = 0; plane < 2; ++plane) {
            scales[i][plane] = fp16(scale_words[plane * groups_of_half + g + i]);
            minima[i][plane] = fp16(minimum_words[plane * groups_of_half + g + i]);
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (g + i) * kGroup;
        decode_groups(bytes + at, scales[i], minima[i], to + at, to + half + at);
      }
    }
  }
}

inline void int4_multiply(const Products& p, int64_t first, int64_t last, void* scratch) {
  auto* decoded = static_cast<uint16_t*>(scratch);
  const auto* x = static_cast<const BFloat16Kind::Activation*>(p.prepared);
  for (int64_t o = first; o < last; o += W) {
    const int64_t outputs = last - o < W ? last - o : W;
    decode_outputs(p, o, outputs, decoded);
    multiply_outputs<BFloat16Kind>(decoded, p.inner, outputs, x, p.rows,
                                   [&](int64_t r, int64_t rows, int64_t c, int64_t count, F found) {
                                     store_tile(p.y, p.out, r, rows, o + c, count, found);
                                   });
  }
}

}  // namespace fineserve::ISA
