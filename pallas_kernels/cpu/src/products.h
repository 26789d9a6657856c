// Products of few activations with matrices [out, inner]: each weight is read from memory once, in the layout in which XLA
// multiplies it too, whatever the number of rows.
//
// A tile is up to W sums, of R rows by W / R outputs; each is a vector of partial sums along `inner`, and in the end all W are
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
  INLINE static void prepare_chunk(const float* x, Activation* to) {
    store(to, _mm512_cvtne2ps_pbh(load<__m512>(x + W), load<__m512>(x)));
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
//
// Outputs one after the other, for rows that are the first to need these weights: memory gives one long stream twice as
// fast as many short ones. Processors look far enough ahead to be busy with several outputs.
template <class Kind, int R, int C>
INLINE typename Kind::Sum streamed_tile(const typename Kind::Weight* weights, int64_t inner,
                                        const typename Kind::Activation* x, int64_t length) {
  static_assert(R * C <= W, "a sum in each lane");
  typename Kind::Sum found[W] = {};
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    const auto* own = weights + c * inner;
    int64_t i = 0;
    for (; i + Kind::kChunk <= inner; i += Kind::kChunk) {
      const auto w = Kind::read(own + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Kind::add(found[r * C + c], w, x + r * length + i);
    }
    if (i < inner) {
      const auto w = read_some<Kind>(own + i, inner - i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Kind::add(found[r * C + c], w, x + r * length + i);
    }
  }
  return sums(found);
}

// The same for rows that find the weights in a cache: outputs side by side, so that activations are loaded once for all.
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

// Up to W outputs of a matrix, of all rows, R at a time; `finish.take<R, C>(row, output, sums)` gets each tile's sums.
template <class Kind, class Finish>
struct Multiplier {
  const typename Kind::Weight* weights;  // of the first output
  int64_t inner, outputs;
  const typename Kind::Activation* x;
  int64_t length;
  Finish& finish;

  template <int R, bool FIRST>
  INLINE void rows(int64_t r) {
    constexpr int C = W / R;
    const auto* own = x + r * length;
    int64_t c = 0;
    for (; c + C <= outputs; c += C) {
      const auto* from = weights + c * inner;
      finish.template take<R, C>(r, c, FIRST ? streamed_tile<Kind, R, C>(from, inner, own, length)
                                             : tile<Kind, R, C>(from, inner, own, length));
    }
    for (; c < outputs; ++c) finish.template take<R, 1>(r, c, tile<Kind, R, 1>(weights + c * inner, inner, own, length));
  }

  INLINE void all_rows(int64_t count) {
    if (count == 1) return rows<1, true>(0);
    rows<2, true>(0);
    int64_t r = 2;
    for (; r + 4 <= count; r += 4) rows<4, false>(r);
    if (r + 2 <= count) {
      rows<2, false>(r);
      r += 2;
    }
    if (r < count) rows<1, false>(r);
  }
};

// A vector of N floats.
template <int N>
struct Few {
  typedef float Lanes __attribute__((vector_size(4 * N)));
};

// C floats, that many times over.
template <int C, int... L>
INLINE F repeated(const float* from, std::integer_sequence<int, L...>) {
  typename Few<C>::Lanes few;
  std::memcpy(&few, from, sizeof few);
  return __builtin_shufflevector(few, few, (L % C)...);
}

template <int C>
INLINE F repeated(const float* from) {
  return repeated<C>(from, std::make_integer_sequence<int, W>{});
}

template <int FIRST, int... L>
INLINE void store_lanes(float* to, F v, std::integer_sequence<int, L...>) {
  const typename Few<sizeof...(L)>::Lanes few = __builtin_shufflevector(v, v, (FIRST + L)...);
  std::memcpy(to, &few, sizeof few);
}

// Row r of a tile, its lanes from r * C on, to y[r * out ..].
template <int R, int C, int r = 0>
INLINE void store_tile(float* y, int64_t out, F found) {
  store_lanes<r * C>(y + r * out, found, std::make_integer_sequence<int, C>{});
  if constexpr (r + 1 < R) store_tile<R, C, r + 1>(y, out, found);
}

// -- activations ------------------------------------------------------------------------------------------------------

inline int64_t bf16_prepared_bytes(int64_t rows, int64_t inner) {
  return rows * round_up(inner, BFloat16Kind::kChunk) * sizeof(BFloat16Kind::Activation);
}

inline void bf16_prepare(const float* x, int64_t rows, int64_t inner, void* prepared) {
  constexpr int64_t kChunk = BFloat16Kind::kChunk;
  auto* to = static_cast<BFloat16Kind::Activation*>(prepared);
  for (int64_t r = 0; r < rows; ++r, x += inner) {
    int64_t i = 0;
    for (; i + kChunk <= inner; i += kChunk, to += kChunk) BFloat16Kind::prepare_chunk(x + i, to);
    if (i == inner) continue;
    float rest[kChunk] = {};
    std::memcpy(rest, x + i, (inner - i) * sizeof(float));
    BFloat16Kind::prepare_chunk(rest, to);
    to += kChunk;
  }
}

// Scales of all rows, then their codes.
inline int64_t int8_prepared_bytes(int64_t rows, int64_t inner) {
  return rows * (sizeof(RowScale) + round_up(inner, Int8Kind::kChunk) * sizeof(Int8Kind::Activation));
}

INLINE const Int8Kind::Activation* int8_codes(const void* prepared, int64_t rows) {
  return reinterpret_cast<const Int8Kind::Activation*>(static_cast<const RowScale*>(prepared) + rows);
}

// The codes of W numbers: nearest to x * factor, ties to even, at most 127 to either side.
INLINE I int8_code(F x, F factor) {
  const F shift = splat(12582912.0f);  // 1.5 * 2**23: what is added to it is rounded to an integer
  const F scaled = x * factor, least = splat(-127.0f), most = splat(127.0f);
  const F bounded = scaled < least ? least : scaled > most ? most : scaled;
  return bits<I>(bounded + shift) - bits<I>(shift);
}

// Codes as `Int8Weights.dot` has them.
inline void int8_prepare(const float* x, int64_t rows, int64_t inner, void* prepared) {
  typedef Int8Kind::Activation Narrow __attribute__((vector_size(W * sizeof(Int8Kind::Activation))));
  auto* scales = static_cast<RowScale*>(prepared);
  auto* to = reinterpret_cast<Int8Kind::Activation*>(scales + rows);
  const int64_t length = round_up(inner, Int8Kind::kChunk), whole = inner / W * W;
  for (int64_t r = 0; r < rows; ++r, x += inner, to += length) {
    float rest[W] = {};
    std::memcpy(rest, x + whole, (inner - whole) * sizeof(float));
    F tops{}, nothing{};  // x - x is 0 unless x is not finite
    const auto look_at = [&](F own) {
      tops = larger(bits<F>(bits<U>(own) & 0x7FFFFFFFu), tops);
      nothing += own - own;
    };
    for (int64_t i = 0; i < whole; i += W) look_at(load<F>(x + i));
    look_at(load<F>(rest));
    float top = largest(tops);
    top = top > 1e-30f ? top : 1e-30f;
    const F factor = splat(127.0f / top);
    I total{};
    const auto encode = [&](F own, Int8Kind::Activation* place) {
      const I code = int8_code(own, factor);
      total += code;
      store(place, __builtin_convertvector(code, Narrow));
    };
    for (int64_t i = 0; i < whole; i += W) encode(load<F>(x + i), to + i);
    if (whole < length) std::memset(to + whole, 0, (length - whole) * sizeof *to);
    if (whole < inner) encode(load<F>(rest), to + whole);
    int32_t sum = 0;
    for (int i = 0; i < W; ++i) sum += total[i];
    const bool finite = ISA::sum(nothing) == 0.0f;
    scales[r] = {finite ? top / 127.0f : __builtin_nanf(""), -Int8Kind::kMoved * sum};
  }
}

// -- outputs ----------------------------------------------------------------------------------------------------------

struct StoreSums {
  float* y;  // of the first output
  int64_t out;

  template <int R, int C>
  INLINE void take(int64_t r, int64_t c, F found) const {
    store_tile<R, C>(y + r * out + c, out, found);
  }
};

INLINE void bf16_multiply_outputs(const Products& p, const uint16_t* weights, int64_t o, int64_t outputs) {
  const auto* x = static_cast<const BFloat16Kind::Activation*>(p.prepared);
  const StoreSums finish{p.y + o, p.out};
  const int64_t length = round_up(p.inner, BFloat16Kind::kChunk);
  Multiplier<BFloat16Kind, const StoreSums>{weights, p.inner, outputs, x, length, finish}.all_rows(p.rows);
}

inline void bf16_multiply(const Products& p, int64_t first, int64_t last, void*) {
  const auto* weights = static_cast<const uint16_t*>(p.kernel);
  for (int64_t o = first; o < last; o += W) {
    bf16_multiply_outputs(p, weights + o * p.inner, o, last - o < W ? last - o : W);
  }
}

struct ScaleSums {
  float* y;             // of the first output
  int64_t out;
  const float* scales;  // from the first output's on
  const RowScale* of_rows;

  template <int R, int C>
  INLINE void take(int64_t r, int64_t c, I found) const {
    F of_row{};
    I start{};
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) of_row[i * C + j] = of_rows[r + i].scale, start[i * C + j] = of_rows[r + i].start;
    }
    store_tile<R, C>(y + r * out + c, out, floats(found + start) * of_row * repeated<C>(scales + c));
  }
};

inline void int8_multiply(const Products& p, int64_t first, int64_t last, void*) {
  const auto* weights = static_cast<const int8_t*>(p.kernel);
  const auto* scales = static_cast<const float*>(p.scale);
  const auto* x = int8_codes(p.prepared, p.rows);
  const int64_t length = round_up(p.inner, Int8Kind::kChunk);
  for (int64_t o = first; o < last; o += W) {
    const ScaleSums finish{p.y + o, p.out, scales + o, static_cast<const RowScale*>(p.prepared)};
    Multiplier<Int8Kind, const ScaleSums>{weights + o * p.inner, p.inner, last - o < W ? last - o : W, x, length, finish}
        .all_rows(p.rows);
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
#pragma GCC unroll 4
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

// Up to W numbers of fp16.
INLINE F fp16_of(const uint16_t* words, int64_t count) {
  if (count == W) return fp16(widen(words));
  uint16_t padded[W] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = words[i];
  return fp16(widen(padded));
}

// `to` bf16[outputs, inner], of outputs from `o` on.
INLINE void decode_outputs(const Products& p, int64_t o, int64_t outputs, uint16_t* to) {
  const int64_t half = p.inner / 2, groups = p.inner / kGroup, groups_of_half = groups / 2;
  for (int64_t c = 0; c < outputs; ++c, to += p.inner) {
    const auto* bytes = static_cast<const uint8_t*>(p.kernel) + (o + c) * half;
    const auto* scale_words = static_cast<const uint16_t*>(p.scale) + (o + c) * groups;
    const auto* minimum_words = static_cast<const uint16_t*>(p.minimum) + (o + c) * groups;
    for (int64_t g = 0; g < groups_of_half; g += W) {
      const int64_t count = groups_of_half - g < W ? groups_of_half - g : W;
      float scales[2][W], minima[2][W];
      for (int plane = 0; plane < 2; ++plane) {
        store(scales[plane], fp16_of(scale_words + plane * groups_of_half + g, count));
        store(minima[plane], fp16_of(minimum_words + plane * groups_of_half + g, count));
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (g + i) * kGroup;
        const float own_scales[2] = {scales[0][i], scales[1][i]}, own_minima[2] = {minima[0][i], minima[1][i]};
        decode_groups(bytes + at, own_scales, own_minima, to + at, to + half + at);
      }
    }
  }
}

inline void int4_multiply(const Products& p, int64_t first, int64_t last, void* scratch) {
  auto* decoded = static_cast<uint16_t*>(scratch);
  for (int64_t o = first; o < last; o += W) {
    const int64_t outputs = last - o < W ? last - o : W;
    decode_outputs(p, o, outputs, decoded);
    bf16_multiply_outputs(p, decoded, o, outputs);
  }
}

}  // namespace fineserve::ISA
