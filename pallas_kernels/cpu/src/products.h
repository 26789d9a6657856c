// Products of activations with matrices [out, inner]: each weight is read from memory once, in the layout in which XLA
// multiplies it too, whatever the number of rows. Many rows are multiplied by panels (see panels.h).
//
// With few, a tile is up to W sums, of R rows by W / R outputs; each is a vector of partial sums along `inner`, and in the end
// all W are added up across lanes at once.
#pragma once

#include "panels.h"

namespace fineserve::ISA {

// -- tiles ------------------------------------------------------------------------------------------------------------

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

// Row r of a tile, its lanes from r * C on, to y[places[r] * out ..].
template <int R, int C, int r = 0>
INLINE void store_tile(float* y, int64_t out, const int32_t* places, F found) {
  store_lanes<r * C>(y + places[r] * out, found, std::make_integer_sequence<int, C>{});
  if constexpr (r + 1 < R) store_tile<R, C, r + 1>(y, out, places, found);
}

// -- activations ------------------------------------------------------------------------------------------------------

template <class Kind>
INLINE bool in_panels(int64_t all_rows) {
  return kHasPanels && all_rows >= Kind::kLeastPanelRows;
}

INLINE const float* row_of(const Activations& a, int64_t r) { return a.x + a.places[r] * a.inner; }

// Prepares rows `first` to `last` by `encode(row, to)`: side by side where panels are multiplied, else one behind the other.
template <class Kind, class Encode>
INLINE void prepare_rows(const Activations& a, int64_t first, int64_t last, int64_t length,
                         typename Kind::Activation* to, void* row, const Encode& encode) {
  using Activation = typename Kind::Activation;
  if (in_panels<Kind>(a.all_rows)) {
    interleave_rows(a.rows, first, last, num_steps<Kind>(length), static_cast<uint32_t*>(row),
                    reinterpret_cast<uint32_t*>(to),
                    [&](int64_t r, uint32_t* words) { encode(r, reinterpret_cast<Activation*>(words)); });
  } else {
    for (int64_t r = first; r < last; ++r) encode(r, to + r * length);
  }
}

inline int64_t bf16_row_bytes(int64_t inner) {
  return round_up(inner, BFloat16Kind::kChunk) * sizeof(BFloat16Kind::Activation);
}

INLINE void bf16_encode(const float* x, int64_t inner, BFloat16Kind::Activation* to) {
  constexpr int64_t kChunk = BFloat16Kind::kChunk;
  int64_t i = 0;
  for (; i + kChunk <= inner; i += kChunk, to += kChunk) BFloat16Kind::prepare_chunk(x + i, to);
  if (i == inner) return;
  float rest[kChunk] = {};
  std::memcpy(rest, x + i, (inner - i) * sizeof(float));
  BFloat16Kind::prepare_chunk(rest, to);
}

template <class Kind>
inline void bf16_prepare(const Activations& a, int64_t first, int64_t last, void* row) {
  auto* to = static_cast<BFloat16Kind::Activation*>(a.codes);
  prepare_rows<Kind>(a, first, last, round_up(a.inner, Kind::kChunk), to, row,
                     [&](int64_t r, auto* own) { bf16_encode(row_of(a, r), a.inner, own); });
}

inline int64_t int8_row_bytes(int64_t inner) {
  return round_up(inner, Int8Kind::kChunk) * sizeof(Int8Kind::Activation);
}

// The codes of W numbers: nearest to x * factor, ties to even, at most 127 to either side.
INLINE I int8_code(F x, F factor) {
  const F shift = splat(12582912.0f);  // 1.5 * 2**23: what is added to it is rounded to an integer
  const F scaled = x * factor, least = splat(-127.0f), most = splat(127.0f);
  const F bounded = scaled < least ? least : scaled > most ? most : scaled;
  return bits<I>(bounded + shift) - bits<I>(shift);
}

// A row's codes and scale as `Int8Weights.dot` has them.
INLINE RowScale int8_encode(const float* x, int64_t inner, Int8Kind::Activation* to) {
  typedef Int8Kind::Activation Narrow __attribute__((vector_size(W * sizeof(Int8Kind::Activation))));
  const int64_t length = round_up(inner, Int8Kind::kChunk), whole = inner / W * W;
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
  return {finite ? top / 127.0f : __builtin_nanf(""), -Int8Kind::kMoved * sum};
}

inline void int8_prepare(const Activations& a, int64_t first, int64_t last, void* row) {
  auto* to = static_cast<Int8Kind::Activation*>(a.codes);
  prepare_rows<Int8Kind>(
      a, first, last, round_up(a.inner, Int8Kind::kChunk), to, row,
      [&](int64_t r, auto* own) { a.scales[r] = int8_encode(row_of(a, r), a.inner, own); });
}

// -- outputs ----------------------------------------------------------------------------------------------------------

struct StoreSums {
  float* y;  // of the first output
  int64_t out;
  const int32_t* places;

  template <int R, int C>
  INLINE void take(int64_t r, int64_t c, F found) const {
    store_tile<R, C>(y + c, out, places + r, found);
  }
  INLINE void store_row(int64_t r, int64_t c, int64_t count, F found) const {
    std::memcpy(y + places[r] * out + c, &found, count * sizeof(float));
  }
};

// Outputs of a matrix that are multiplied together, of all rows, and the memory that takes.
template <class Kind>
INLINE int64_t outputs_together(int64_t all_rows) {
  return in_panels<Kind>(all_rows) ? kPanelOutputs : W;
}

template <class Kind>
INLINE int64_t panel_scratch(int64_t all_rows, int64_t inner) {
  return outputs_together<Kind>(all_rows) == W ? 0 : panel_bytes<Kind>(inner);
}

template <class Kind, class Finish>
INLINE void multiply_outputs(const typename Kind::Weight* weights, const Activations& a, int64_t outputs, void* panel,
                             const char* next, const Finish& finish) {
  const auto* x = static_cast<const typename Kind::Activation*>(a.codes);
  const int64_t inner = a.inner;
  if constexpr (kHasPanels) {
    if (in_panels<Kind>(a.all_rows)) {
      return multiply_panel<Kind>(weights, inner, outputs, x, a.rows, static_cast<F*>(panel), next, finish);
    }
  }
  Multiplier<Kind, const Finish>{weights, inner, outputs, x, round_up(inner, Kind::kChunk), finish}.all_rows(a.rows);
}

// Outputs `first` to `last`; `finish_of(o)` takes the sums of those from `o` on.
template <class Kind, class FinishOf>
INLINE void multiply_matrix(const Products& p, int64_t first, int64_t last, void* scratch, const FinishOf& finish_of) {
  const auto* weights = static_cast<const typename Kind::Weight*>(p.kernel);
  const int64_t inner = p.activations.inner, together = outputs_together<Kind>(p.activations.all_rows);
  for (int64_t o = first; o < last; o += together) {
    const auto* own = weights + o * inner;
    const auto* next = o + 2 * together <= p.out ? reinterpret_cast<const char*>(own + together * inner) : nullptr;
    const int64_t outputs = last - o < together ? last - o : together;
    multiply_outputs<Kind>(own, p.activations, outputs, scratch, next, finish_of(o));
  }
}

inline int64_t bf16_scratch(int64_t all_rows, int64_t inner) { return panel_scratch<BFloat16Kind>(all_rows, inner); }

inline void bf16_multiply(const Products& p, int64_t first, int64_t last, void* scratch) {
  multiply_matrix<BFloat16Kind>(p, first, last, scratch, [&](int64_t o) {
    return StoreSums{p.y + o, p.out, p.activations.places};
  });
}

struct ScaleSums {
  float* y;             // of the first output
  int64_t out;
  const int32_t* places;
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
    store_tile<R, C>(y + c, out, places + r, floats(found + start) * of_row * repeated<C>(scales + c));
  }
  INLINE void store_row(int64_t r, int64_t c, int64_t count, I found) const {
    F own{};
    std::memcpy(&own, scales + c, count * sizeof(float));
    const F values = floats(found + of_rows[r].start) * of_rows[r].scale * own;
    std::memcpy(y + places[r] * out + c, &values, count * sizeof(float));
  }
};

inline int64_t int8_scratch(int64_t all_rows, int64_t inner) { return panel_scratch<Int8Kind>(all_rows, inner); }

inline void int8_multiply(const Products& p, int64_t first, int64_t last, void* scratch) {
  const auto* scales = static_cast<const float*>(p.scale);
  multiply_matrix<Int8Kind>(p, first, last, scratch, [&](int64_t o) {
    return ScaleSums{p.y + o, p.out, p.activations.places, scales + o, p.activations.scales};
  });
}

// -- int4 -------------------------------------------------------------------------------------------------------------

constexpr int64_t kGroup = 32;  // `weight_formats.INT4_GROUP`

#if defined(__AVX512BF16__)
struct Planes {
  __m512i low, high;  // 32 bf16 numbers each
};

// A group's values of each plane: from bytes whose low halves are the codes of one, the high of other. Codes look up the
// 16 numbers that a group has: one table for both planes, those of the high one behind.
INLINE Planes decode_planes(const uint8_t* bytes, const float* scales, const float* minima) {
  const F codes = bits<F>(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const F numbers[2] = {codes * scales[0] + minima[0], codes * scales[1] + minima[1]};
  const __m512i table = bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(numbers[1]), bits<__m512>(numbers[0])));
  const __m512i words = _mm512_cvtepu8_epi16(load<__m256i>(bytes));
  const __m512i of_low = _mm512_and_si512(words, _mm512_set1_epi16(0xF));
  const __m512i of_high = _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi16(0x10));
  return {_mm512_permutexvar_epi16(of_low, table), _mm512_permutexvar_epi16(of_high, table)};
}
#endif

// A group's 32 values of each plane, rounded to bf16: from bytes whose low halves are the codes of one, the high of other.
INLINE void decode_groups(const uint8_t* bytes, const float* scales, const float* minima, uint16_t* low,
                          uint16_t* high) {
#if defined(__AVX512BF16__)
  const Planes planes = decode_planes(bytes, scales, minima);
  store(low, planes.low), store(high, planes.high);
#else
  for (int64_t i = 0; i < kGroup; i += W) {
    const U codes = widen(bytes + i);
    const F one = floats(codes & 0xF) * scales[0] + minima[0], other = floats(codes >> 4) * scales[1] + minima[1];
    store(low + i, __builtin_convertvector(bits<U>(rounded_to_bf16(one)) >> 16, Words));
    store(high + i, __builtin_convertvector(bits<U>(rounded_to_bf16(other)) >> 16, Words));
  }
#endif
}

constexpr int64_t kInt4Ahead = 4096;  // bytes: weights that are on their way from memory while others are decoded

// Up to W numbers of fp16.
INLINE F fp16_of(const uint16_t* words, int64_t count) {
  if (count == W) return fp16(widen(words));
#if defined(__AVX512BW__)
  return bits<F>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, words)));
#else
  uint16_t padded[W] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = words[i];
  return fp16(widen(padded));
#endif
}

// Calls `take(at, bytes, scales, minima)` for the groups of an output, one of each plane at a time: from `at` on in its half
// of the inputs.
template <class Take>
INLINE void each_group(const Products& p, int64_t output, const Take& take) {
  const int64_t half = p.activations.inner / 2, groups = half / kGroup;
  const auto* bytes = static_cast<const uint8_t*>(p.kernel) + output * half;
  const auto* scale_words = static_cast<const uint16_t*>(p.scale) + output * 2 * groups;
  const auto* minimum_words = static_cast<const uint16_t*>(p.minimum) + output * 2 * groups;
  for (int64_t g = 0; g < groups; g += W) {
    const int64_t count = groups - g < W ? groups - g : W;
    float scales[2][W], minima[2][W];
    for (int plane = 0; plane < 2; ++plane) {
      store(scales[plane], fp16_of(scale_words + plane * groups + g, count));
      store(minima[plane], fp16_of(minimum_words + plane * groups + g, count));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (g + i) * kGroup;
      __builtin_prefetch(bytes + at + kInt4Ahead);
      const float own_scales[2] = {scales[0][i], scales[1][i]}, own_minima[2] = {minima[0][i], minima[1][i]};
      take(at, bytes + at, own_scales, own_minima);
    }
  }
}

// `to` bf16[outputs, inner], of outputs from `o` on.
INLINE void decode_outputs(const Products& p, int64_t o, int64_t outputs, uint16_t* to) {
  const int64_t inner = p.activations.inner;
  for (int64_t c = 0; c < outputs; ++c, to += inner) {
    each_group(p, o + c, [&](int64_t at, const uint8_t* bytes, const float* scales, const float* minima)
                             __attribute__((always_inline)) {
                               decode_groups(bytes, scales, minima, to + at, to + inner / 2 + at);
                             });
  }
}

#if defined(__AVX512BF16__)
// The only row there is, with outputs `first` to `last`: multiplied as they are decoded.
inline void int4_multiply_row(const Products& p, int64_t first, int64_t last) {
  const auto* x = static_cast<const Int4Kind::Activation*>(p.activations.codes);
  const auto* x_of_high = x + p.activations.inner / 2;
  for (int64_t o = first; o < last; o += W) {
    const int64_t outputs = last - o < W ? last - o : W;
    F found[W] = {};
    for (int64_t c = 0; c < outputs; ++c) {
      F low{}, high{};
      each_group(p, o + c, [&](int64_t at, const uint8_t* bytes, const float* scales, const float* minima)
                               __attribute__((always_inline)) {
                                 const Planes planes = decode_planes(bytes, scales, minima);
                                 Int4Kind::add(low, bits<Int4Kind::Vector>(planes.low), x + at);
                                 Int4Kind::add(high, bits<Int4Kind::Vector>(planes.high), x_of_high + at);
                               });
      found[c] = low + high;
    }
    StoreSums{p.y + o, p.out, p.activations.places}.store_row(0, 0, outputs, sums(found));
  }
}
#endif

// The decoded outputs come first, then their panel.
inline int64_t int4_decoded_bytes(int64_t all_rows, int64_t inner) {
  return round_up(outputs_together<Int4Kind>(all_rows) * inner * static_cast<int64_t>(sizeof(uint16_t)), sizeof(F));
}

inline int64_t int4_scratch(int64_t all_rows, int64_t inner) {
  return int4_decoded_bytes(all_rows, inner) + panel_scratch<Int4Kind>(all_rows, inner);
}

inline void int4_multiply(const Products& p, int64_t first, int64_t last, void* scratch) {
#if defined(__AVX512BF16__)
  if (p.activations.all_rows == 1) return int4_multiply_row(p, first, last);
#endif
  auto* decoded = static_cast<uint16_t*>(scratch);
  const int64_t all_rows = p.activations.all_rows, together = outputs_together<Int4Kind>(all_rows);
  void* panel = static_cast<char*>(scratch) + int4_decoded_bytes(all_rows, p.activations.inner);
  for (int64_t o = first; o < last; o += together) {
    const int64_t outputs = last - o < together ? last - o : together;
    const StoreSums finish{p.y + o, p.out, p.activations.places};
    decode_outputs(p, o, outputs, decoded);
    multiply_outputs<Int4Kind>(decoded, p.activations, outputs, panel, nullptr, finish);
  }
}

}  // namespace fineserve::ISA
