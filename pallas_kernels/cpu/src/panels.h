// Products of many rows of activations: the arithmetic is the limit, and so each number that a register is loaded with
// takes part in as many products as registers allow.
//
// The weights of a few vectors of outputs are laid out anew, as a panel: for each step along `inner`, the 32-bit words of
// all its outputs side by side, a word of each. Then a tile of rows by outputs keeps its sums in registers, a lane an
// output, so that nothing is added up across lanes: a step multiplies the panel's vectors with each row's word, which all
// lanes get. Laying out costs about as much as a row's products.
#pragma once

#include "products_kinds.h"

namespace fineserve::ISA {

#if defined(__AVX2__)
constexpr bool kHasPanels = true;
#else
constexpr bool kHasPanels = false;
#endif

constexpr int kPanelVectors = 2;
constexpr int64_t kPanelOutputs = kPanelVectors * W;
#if defined(__AVX512F__)
constexpr int kPanelRows = 12;  // whose sums fill 24 of 32 registers
#else
constexpr int kPanelRows = 6;  // 12 of 16
#endif

// 32-bit words of a prepared row, each of which is a step: `length` activations.
template <class Kind>
INLINE int64_t num_steps(int64_t length) {
  return length * static_cast<int64_t>(sizeof(typename Kind::Activation)) / 4;
}

// Bytes of a panel. The steps of a chunk of weights are those of its vectors, one after the other.
template <class Kind>
INLINE int64_t panel_bytes(int64_t inner) {
  return num_steps<Kind>(round_up(inner, Kind::kChunk)) * kPanelOutputs * 4;
}

// Lays out W rows of weights, `inner` apart, as the p-th vectors of a panel. `present`: how many there are; more are 0.
template <class Kind, bool ALL>
INLINE void lay_out(const typename Kind::Weight* weights, int64_t inner, int64_t present, F* to) {
  constexpr int kParts = sizeof(typename Kind::Vector) / sizeof(F);
  for (int64_t i = 0; i < inner; i += Kind::kChunk, to += kParts * W * kPanelVectors) {
    F words[kParts][W];
    const int64_t count = inner - i < Kind::kChunk ? inner - i : Kind::kChunk;
    const auto take = [&](int c, auto w) __attribute__((always_inline)) {
      F parts[kParts];
      std::memcpy(parts, &w, sizeof w);
      for (int part = 0; part < kParts; ++part) words[part][c] = parts[part];
    };
    if (ALL && count == Kind::kChunk) {
      const auto* from = weights + i;
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c, from += inner) {
        take(c, Kind::read(from));
        asm("" : "+r"(from));  // or W addresses are kept, which are more than there are registers
      }
    } else {
      for (int c = 0; c < W; ++c) take(c, read_some<Kind>(weights + c * inner + i, c < present ? count : 0));
    }
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      transpose(words[part]);
#pragma GCC unroll 16
      for (int step = 0; step < W; ++step) to[(part * W + step) * kPanelVectors] = words[part][step];
    }
  }
}

// Lays out `outputs` rows of weights, at most `kPanelOutputs`; what is missing counts as 0.
template <class Kind>
INLINE void make_panel(const typename Kind::Weight* weights, int64_t inner, int64_t outputs, F* panel) {
  for (int p = 0; p < kPanelVectors; ++p) {
    const auto* own = weights + p * W * inner;
    const int64_t present = outputs - p * W;
    present >= W ? lay_out<Kind, true>(own, inner, W, panel + p) : lay_out<Kind, false>(own, inner, present, panel + p);
  }
}

// -- rows of activations ----------------------------------------------------------------------------------------------

// The first row of a tile: tiles are of about equal height.
INLINE int64_t first_of_tile(int64_t rows, int64_t tile) {
  const int64_t tiles = (rows + kPanelRows - 1) / kPanelRows;
  return rows * tile / tiles;
}

// Prepares rows `first` to `last` by `encode(row, to)`, and puts the words of a tile's rows side by side, step by step.
// row: memory of one row.
template <class Encode>
INLINE void interleave_rows(int64_t rows, int64_t first, int64_t last, int64_t steps, uint32_t* row, uint32_t* words,
                            const Encode& encode) {
  for (int64_t tile = 0, start = 0; start < last; ++tile) {
    const int64_t end = first_of_tile(rows, tile + 1), height = end - start;
    for (int64_t r = start > first ? start : first; r < (end < last ? end : last); ++r) {
      encode(r, row);
      uint32_t* to = words + start * steps + (r - start);
      for (int64_t s = 0; s < steps; ++s) to[s * height] = row[s];
    }
    start = end;
  }
}

// -- products ---------------------------------------------------------------------------------------------------------

// What is asked for from memory while a tile is multiplied: two lines of a cache a step, `second` bytes apart, the first
// `stride` bytes behind that of the step before. With 0 for both it is the same line over and over, which costs nothing.
struct Ahead {
  const char* from;
  int64_t stride, second;
};

// The sums of a tile of R rows with a panel.
template <class Kind, int R, class Finish>
__attribute__((noinline)) void panel_tile(const F* panel, int64_t steps, const uint32_t* x, int64_t r, int64_t outputs,
                                          Ahead ahead, const Finish& finish) {
  typename Kind::Sum found[R][kPanelVectors] = {};
  for (int64_t s = 0; s < steps; ++s, panel += kPanelVectors, x += R) {
    __builtin_prefetch(ahead.from);
    __builtin_prefetch(ahead.from + ahead.second);
    ahead.from += ahead.stride;
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const U word = U{} + x[i];
#pragma GCC unroll 4
      for (int p = 0; p < kPanelVectors; ++p) Kind::add_words(found[i][p], panel[p], word);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < kPanelVectors; ++p) {
      if ((p + 1) * W <= outputs) {
        finish.store_row(r + i, p * W, W, found[i][p]);
      } else if (p * W < outputs) {
        finish.store_row(r + i, p * W, outputs - p * W, found[i][p]);
      }
    }
  }
}

template <class Kind, class Finish, int R = kPanelRows>
INLINE void panel_rows(int64_t count, const F* panel, int64_t steps, const uint32_t* x, int64_t r, int64_t outputs,
                       Ahead ahead, const Finish& finish) {
  if (count == R) return panel_tile<Kind, R>(panel, steps, x, r, outputs, ahead, finish);
  if constexpr (R > 1) panel_rows<Kind, Finish, R - 1>(count, panel, steps, x, r, outputs, ahead, finish);
}

// All rows with the weights of one panel. `next`: the weights of the panel that follows, or null. They come while the first
// two tiles are multiplied: all during one would be more than memory gives in the time.
template <class Kind, class Finish>
INLINE void multiply_panel(const typename Kind::Weight* weights, int64_t inner, int64_t outputs,
                           const typename Kind::Activation* x, int64_t rows, F* panel, const char* next,
                           const Finish& finish) {
  const int64_t steps = num_steps<Kind>(round_up(inner, Kind::kChunk));
  make_panel<Kind>(weights, inner, outputs, panel);
  const auto* words = reinterpret_cast<const uint32_t*>(x);
  for (int64_t tile = 0, r = 0; r < rows; ++tile) {
    const int64_t end = first_of_tile(rows, tile + 1);
    const auto* own = words + r * steps;
    Ahead ahead{reinterpret_cast<const char*>(panel), 0, 0};
    if (next && tile < 2) {
      ahead = rows <= kPanelRows ? Ahead{next, 128, 64} : Ahead{next + tile * steps * 64, 64, 0};
    }
    panel_rows<Kind>(end - r, panel, steps, own, r, outputs, ahead, finish);
    r = end;
  }
}

}  // namespace fineserve::ISA
