// Attention of prefill chunks among their own tokens: `chunk_attention.attend_within`, a page of queries and a KV head at a
// time, by the blocks of attention.h. Only pages of the queries' own chunk are looked at.
#pragma once

#include "attention.h"

namespace fineserve::ISA {

inline int64_t attend_within_scratch(const Attention& a) {
  int64_t bytes;
  divide(nullptr, a.page_size * a.group, padded(a.head_dim), 0, &bytes);
  return bytes;
}

// `count` tokens from a slot on, of a head, padded to `stride`; behind them zeros up to a whole register of tokens.
INLINE void take_tokens(const Attention& a, const float* from, int64_t head, int64_t slot, int64_t count, int64_t stride,
                        float* to) {
  const float* own = from + (head * a.num_queries + slot) * a.head_dim;
  if (stride == a.head_dim) {
    std::memcpy(to, own, count * stride * sizeof(float));
  } else {
    for (int64_t t = 0; t < count; ++t) {
      std::memcpy(to + t * stride, own + t * a.head_dim, a.head_dim * sizeof(float));
      for (int64_t d = a.head_dim; d < stride; ++d) to[t * stride + d] = 0.0f;
    }
  }
  std::memset(to + count * stride, 0, (round_up(count, W) - count) * stride * sizeof(float));
}

// What queries of no chunk get, which see no key.
INLINE void see_nothing(const Attention& a, int64_t first_slot, int64_t rows, int64_t head, float* m, float* l,
                        float* acc) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = place_of_row(a, first_slot, head, r);
    m[at] = kNegative, l[at] = 0.0f;
    std::memset(acc + at * a.head_dim, 0, a.head_dim * sizeof(float));
  }
}

inline void attend_within(const Attention& a, const Within& w, int64_t page, int64_t head, void* memory, float* m,
                          float* l, float* acc) {
  const int64_t stride = padded(a.head_dim), rows = a.page_size * a.group, first_slot = page * a.page_size;
  if (w.chunk_of_page[page] < 0) return see_nothing(a, first_slot, rows, head, m, l, acc);
  int64_t bytes, first_page = page;
  while (first_page > 0 && w.chunk_of_page[first_page - 1] == w.chunk_of_page[page]) --first_page;
  const int64_t start = first_page * a.page_size;  // slots and positions are counted from the chunk's first
  const Scratch s = divide(static_cast<char*>(memory), rows, stride, 0, &bytes);
  float* sums = s.rotated_acc;
  take_queries(a, first_slot, rows, head, false, s);
  std::memset(sums, 0, rows * stride * sizeof(float));
  Walk walk{a, rows, stride, first_slot - start, {s.plain, nullptr}, {sums, nullptr}, s.rows, {}, s.transposed};
  walk.unpacked.k = s.k, walk.unpacked.v = s.v, walk.unpacked.stride = stride;
  Format exact{};
  exact.keys.codec = exact.values.codec = kFloat32;
  const auto attend_tokens = [&](const float* k, const float* v, int64_t slot, int64_t count) {
    take_tokens(a, k, head, slot, count, stride, s.k);
    take_tokens(a, v, head, slot, count, stride, s.v);
    attend_block(walk, exact, slot - start, count);
  };
  for (int64_t slot = start; slot < first_slot; slot += kBlock) {
    attend_tokens(w.earlier_k, w.earlier_v, slot, first_slot - slot < kBlock ? first_slot - slot : kBlock);
  }
  for (int64_t slot = first_slot; slot < first_slot + a.page_size; slot += kBlock) {
    const int64_t left = first_slot + a.page_size - slot;
    attend_tokens(w.own_k, w.own_v, slot, left < kBlock ? left : kBlock);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = place_of_row(a, first_slot, head, r);
    m[at] = s.rows[r].m, l[at] = s.rows[r].l;
    std::memcpy(acc + at * a.head_dim, sums + r * stride, a.head_dim * sizeof(float));
  }
}

}  // namespace fineserve::ISA
