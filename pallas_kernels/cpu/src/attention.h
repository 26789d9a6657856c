// Attention of a query block to KV splits in any formats: unpacked in blocks of tokens that stay in a core's first cache,
// products and a running softmax (Milakov and Gimelshein, arXiv 1805.02867) at once.
#pragma once

#include "codecs.h"

namespace fineserve::ISA {

constexpr float kNegative = -1e30f;  // `softmax.NEGATIVE`
constexpr int kQueryRows = 4;        // query rows that are taken together

INLINE int64_t padded(int64_t dim) { return (dim + W - 1) / W * W; }

// The tokens of a block that a query sees: from `low` up to `high`, counted from the block's first token.
struct Range {
  int64_t low, high;
};

INLINE Range seen(const Attention& a, int64_t query_position, int64_t first_position, int64_t count) {
  const int64_t reach = query_position - first_position + 1;
  Range r{0, reach < count ? reach : count};
  if (a.window && reach > a.window) r.low = reach - a.window;
  if (r.high < 0) r.high = 0;
  if (r.low > r.high) r.low = r.high;
  return r;
}

// -- rotations --------------------------------------------------------------------------------------------------------

// By Hadamard blocks, as `formats.int4.hadamard`; its own inverse.
INLINE void rotate(float* x, int64_t dim, int64_t block) {
  const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(block));
  for (int64_t start = 0; start < dim; start += block) {
    float* b = x + start;
    for (int64_t step = 1; step < block; step *= 2) {
      for (int64_t i = 0; i < block; i += 2 * step) {
        for (int64_t j = i; j < i + step; ++j) {
          const float one = b[j], other = b[j + step];
          b[j] = one + other, b[j + step] = one - other;
        }
      }
    }
    for (int64_t i = 0; i < block; ++i) b[i] *= norm;
  }
}

// -- products ---------------------------------------------------------------------------------------------------------

// Logits of one query to `count` keys: W keys at a time, each with its own sum, which are then added up across lanes.
INLINE void logits_of_row(const float* q, const float* k, int64_t stride, int64_t count, float* to) {
  for (int64_t t = 0; t < count; t += W) {
    F parts[W] = {};
    const float* row = k + t * stride;
    for (int64_t d = 0; d < stride; d += W) {
      const F own = load<F>(q + d);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) parts[i] += own * load<F>(row + i * stride + d);
    }
    store(to + t, sums(parts));
  }
}

// Logits of R queries to `count` keys whose matrix lies transposed, [dim, kBlock].
template <int R>
INLINE void logits_of_rows(const float* q, int64_t stride, const float* k, int64_t count, float* to) {
  constexpr int C = W == 16 ? 4 : 2;
  for (int64_t t = 0; t < count; t += C * W) {
    F found[R][C] = {};
    for (int64_t d = 0; d < stride; ++d) {
      F keys[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) keys[c] = load<F>(k + d * kBlock + t + c * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F own = splat(q[r * stride + d]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) found[r][c] += own * keys[c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store(to + r * kBlock + t + c * W, found[r][c]);
    }
  }
}

// acc = acc * correction + weights * values, of R rows and C vectors of their channels.
template <int R, int C>
INLINE void add_values(float* acc, int64_t stride, const float* corrections, const float* weights, const float* v,
                       int64_t low, int64_t high) {
  F sums[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = load<F>(acc + r * stride + c * W) * corrections[r];
  }
  for (int64_t t = low; t < high; ++t) {
    F values[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) values[c] = load<F>(v + t * stride + c * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F weight = splat(weights[r * kBlock + t]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] += weight * values[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(acc + r * stride + c * W, sums[r][c]);
  }
}

template <int R>
INLINE void add_all_values(float* acc, int64_t stride, const float* corrections, const float* weights, const float* v,
                           int64_t low, int64_t high) {
  constexpr int C = W == 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + C * W <= stride; d += C * W) add_values<R, C>(acc + d, stride, corrections, weights, v + d, low, high);
  for (; d < stride; d += W) add_values<R, 1>(acc + d, stride, corrections, weights, v + d, low, high);
}

// -- softmax ----------------------------------------------------------------------------------------------------------

// A query row as it goes through the blocks.
struct Row {
  float m, l;
};

// Turns the logits of a block into weights, in place; returns what the sums so far must be multiplied by. Weights are 0
// outside the range, up to the end of the last vector that it reaches into.
INLINE float weigh(const Attention& a, const Format& f, const Unpacked& u, Range range, Row& row, float* logits,
                   float* zero_points) {
  const int64_t first = range.low / W * W;
  F largest_logits = splat(kNegative);
  const I lane = [] {
    I v{};
    for (int i = 0; i < W; ++i) v[i] = i;
    return v;
  }();
  const I low = I{} + static_cast<int32_t>(range.low), high = I{} + static_cast<int32_t>(range.high);
  for (int64_t t = first; t < range.high; t += W) {
    F x = load<F>(logits + t);
    if (has_k_scale(f)) x = x * load<F>(u.k_scale + t);
    if (a.soft_cap != 0) x = a.soft_cap * tanh(x / a.soft_cap);
    const I token = lane + static_cast<int32_t>(t);
    x = (token >= low) & (token < high) ? x : splat(kNegative);
    store(logits + t, x);
    largest_logits = larger(x, largest_logits);
  }
  const float block_m = largest(largest_logits), m = block_m > row.m ? block_m : row.m;
  const float correction = exp(splat(row.m - m))[0];
  F sum_of_weights{}, sum_of_zero_points{};
  for (int64_t t = first; t < range.high; t += W) {
    const I token = lane + static_cast<int32_t>(t);
    const I counts = (token >= low) & (token < high);
    const F weight = counts ? exp(load<F>(logits + t) - m) : F{};
    sum_of_weights += weight;
    if (has_zero_point(f)) sum_of_zero_points += counts ? weight * load<F>(u.v_zero_point + t) : F{};
    store(logits + t, has_v_scale(f) ? (counts ? weight * load<F>(u.v_scale + t) : F{}) : weight);
  }
  row.l = row.l * correction + sum(sum_of_weights);
  row.m = m;
  *zero_points = has_zero_point(f) ? sum(sum_of_zero_points) : 0.0f;
  return correction;
}

// -- a block ----------------------------------------------------------------------------------------------------------

// The state of a query block on its way through its pieces.
struct Walk {
  const Attention& a;
  int64_t rows, stride;
  int64_t first_query_position;
  const float* q[2];  // plain, and rotated, [rows, stride]
  float* acc[2];      // of values as they are, and of rotated ones
  Row* row;
  Unpacked unpacked;
  float* transposed;  // [stride, kBlock]
};

template <int R>
INLINE void attend_rows(Walk& w, const Format& f, int64_t first, int64_t first_position, int64_t count,
                        bool transposed) {
  const Attention& a = w.a;
  const int k_side = f.keys.codec == kInt4, v_side = f.values.codec == kInt4;
  alignas(64) float logits[R * kBlock];
  float corrections[R], zero_points[R];
  int64_t low = count, high = 0;
  Range ranges[R];
  for (int r = 0; r < R; ++r) {
    ranges[r] = seen(a, w.first_query_position + (first + r) / a.group, first_position, count);
    if (ranges[r].low < ranges[r].high) {
      low = ranges[r].low < low ? ranges[r].low : low;
      high = ranges[r].high > high ? ranges[r].high : high;
    }
  }
  if (low >= high) return;
  const float* q = w.q[k_side] + first * w.stride;
  if (transposed) {
    logits_of_rows<R>(q, w.stride, w.transposed, high, logits);
  } else {
    for (int r = 0; r < R; ++r) logits_of_row(q + r * w.stride, w.unpacked.k, w.stride, high, logits + r * kBlock);
  }
  for (int r = 0; r < R; ++r) {
    float* own = logits + r * kBlock;
    corrections[r] = 1.0f, zero_points[r] = 0.0f;
    if (ranges[r].low < ranges[r].high) {
      corrections[r] = weigh(a, f, w.unpacked, ranges[r], w.row[first + r], own, &zero_points[r]);
    } else {
      ranges[r] = {low, low};
    }
    // Another row of these may see more.
    for (int64_t t = low; t < ranges[r].low; ++t) own[t] = 0.0f;
    for (int64_t t = ranges[r].high; t < high; ++t) own[t] = 0.0f;
  }
  float* acc = w.acc[v_side] + first * w.stride;
  add_all_values<R>(acc, w.stride, corrections, logits, w.unpacked.v, low, high);
  if (w.acc[1 - v_side]) {  // sums of the other side are of the same softmax
    float* other = w.acc[1 - v_side] + first * w.stride;
    for (int r = 0; r < R; ++r) {
      if (corrections[r] == 1.0f) continue;
      for (int64_t d = 0; d < w.stride; d += W) {
        store(other + r * w.stride + d, load<F>(other + r * w.stride + d) * corrections[r]);
      }
    }
  }
  if (has_zero_point(f)) {
    for (int r = 0; r < R; ++r) {
      for (int64_t d = 0; d < w.stride; d += W) {
        store(acc + r * w.stride + d, load<F>(acc + r * w.stride + d) + zero_points[r]);
      }
    }
  }
}

inline void transpose_keys(Walk& w, int64_t count) {
  for (int64_t t = 0; t < count; t += W) {
    for (int64_t d = 0; d < w.stride; d += W) {
      F rows[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) rows[i] = load<F>(w.unpacked.k + (t + i) * w.stride + d);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(w.transposed + (d + i) * kBlock + t, rows[i]);
    }
  }
}

inline void attend_block(Walk& w, const Format& f, int64_t first_position, int64_t count) {
  const bool transposed = w.rows >= 2 * W;  // from about there on transposing pays
  if (transposed) transpose_keys(w, count);
  int64_t r = 0;
  for (; r + kQueryRows <= w.rows; r += kQueryRows) {
    attend_rows<kQueryRows>(w, f, r, first_position, count, transposed);
  }
  switch (w.rows - r) {
    case 3: attend_rows<3>(w, f, r, first_position, count, transposed); break;
    case 2: attend_rows<2>(w, f, r, first_position, count, transposed); break;
    case 1: attend_rows<1>(w, f, r, first_position, count, transposed); break;
    default: break;
  }
}

// A page that a query block attends to.
struct Page {
  const uint16_t* layer;
  const Format* format;
  int64_t count;  // its tokens that count
};

constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kAhead = 4;    // pages that are on their way from memory while others are computed

INLINE void prefetch(const uint16_t* from, int64_t words) {
  const auto* bytes = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < 2 * words; i += kLine) __builtin_prefetch(bytes + i, 0, 2);
}

INLINE void prefetch_page(const Attention& a, const Page& page, int64_t head) {
  const Place place{page.layer, head, 0, page.count, 0};
  const Side &keys = page.format->keys, &values = page.format->values;
  prefetch(words_of(a, keys, place), page.count * keys.vector_words);
  prefetch(words_of(a, values, place), page.count * values.vector_words);
}

// The pages of all pieces, in order; returns how many.
inline int64_t find_pages(const Attention& a, const Piece* pieces, int64_t num_pieces, Page* to) {
  int64_t found = 0;
  for (int64_t i = 0; i < num_pieces; ++i) {
    const Format& f = a.formats[pieces[i].format_id];
    const int32_t* pages = a.pages + pieces[i].split * a.split_pages;
    for (int64_t left = a.num_tokens[pieces[i].split]; left > 0; left -= a.page_size) {
      const uint16_t* layer = a.arena + *pages++ * a.unit_words + a.layer * f.layer_words;
      to[found++] = {layer, &f, left < a.page_size ? left : a.page_size};
    }
  }
  return found;
}

// Where a task is: the head that it computes, and the pages, those of the heads that follow behind its own.
struct Course {
  const Page* pages;
  int64_t num_pages, head, last_head;
};

INLINE void prefetch_ahead(const Attention& a, const Course& course, int64_t page) {
  const int64_t next = page + kAhead, heads = next / course.num_pages;
  if (course.head + heads < course.last_head) prefetch_page(a, course.pages[next % course.num_pages], course.head + heads);
}

// Blocks of up to `kBlock` tokens of a piece, whose pages are those from `first_page` on.
inline void attend_piece(Walk& w, const Course& course, const Piece& piece, int64_t first_page) {
  const Attention& a = w.a;
  const Format& f = a.formats[piece.format_id];
  const int64_t num_tokens = a.num_tokens[piece.split], position = a.positions[piece.split];
  const int64_t last_query_position = w.first_query_position + (w.rows - 1) / a.group;
  for (int64_t start = 0; start < num_tokens; start += kBlock) {
    const int64_t left = num_tokens - start, count = left < kBlock ? left : kBlock, first = position + start;
    if (first > last_query_position) return;
    if (a.window && first + count <= w.first_query_position - a.window + 1) continue;
    for (int64_t done = 0; done < count;) {
      const int64_t in_page = (start + done) % a.page_size, page = first_page + (start + done) / a.page_size;
      const int64_t rest = a.page_size - in_page, wanted = count - done;
      if (in_page == 0) prefetch_ahead(a, course, page);
      const Place place{course.pages[page].layer, course.head, in_page, rest < wanted ? rest : wanted, done};
      unpack(a, f, place, w.unpacked);
      done += place.count;
    }
    attend_block(w, f, first, count);
  }
}

// -- what `Kernels` offers --------------------------------------------------------------------------------------------

struct Scratch {
  float *plain, *rotated, *rotated_acc, *k, *v, *transposed;
  Row* rows;
  Page* pages;
};

// Parts of so much memory, or with none, in `bytes`, how much they take.
inline Scratch divide(char* memory, int64_t rows, int64_t stride, int64_t pages, int64_t* bytes) {
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    char* own = memory + used;
    used += (size + kLine - 1) / kLine * kLine;
    return own;
  };
  const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * sizeof(float))); };
  Scratch s;
  s.plain = floats(rows * stride), s.rotated = floats(rows * stride), s.rotated_acc = floats(rows * stride);
  s.k = floats(kBlock * stride), s.v = floats(kBlock * stride), s.transposed = floats(kBlock * stride);
  s.rows = reinterpret_cast<Row*>(take(rows * sizeof(Row)));
  s.pages = reinterpret_cast<Page*>(take(pages * sizeof(Page)));
  *bytes = used;
  return s;
}

inline int64_t attend_scratch(const Attention& a, int64_t rows, int64_t num_pieces) {
  int64_t bytes;
  divide(nullptr, rows, padded(a.head_dim), num_pieces * a.split_pages, &bytes);
  return bytes;
}

INLINE bool rotates_any(const Format& f) { return f.keys.codec == kInt4 || f.values.codec == kInt4; }

// Where row r of a block's queries is among all: row r is query r / group, head r % group.
INLINE int64_t place_of_row(const Attention& a, int64_t first_query, int64_t head, int64_t r) {
  return ((first_query + r / a.group) * a.kv_heads + head) * a.group + r % a.group;
}

// Query rows of a head, from a query on, padded with zeros; rotated, too, where a format needs that.
inline void take_queries(const Attention& a, int64_t first_query, int64_t rows, int64_t head, bool rotates,
                         const Scratch& s) {
  const int64_t stride = padded(a.head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = a.q + place_of_row(a, first_query, head, r) * a.head_dim;
    float* to = s.plain + r * stride;
    for (int64_t d = 0; d < stride; ++d) to[d] = d < a.head_dim ? from[d] : 0.0f;
    if (rotates) {
      std::memcpy(s.rotated + r * stride, to, stride * sizeof(float));
      rotate(s.rotated + r * stride, a.head_dim, a.rotation_block);
      std::memset(s.rotated_acc + r * stride, 0, stride * sizeof(float));
    }
    s.rows[r] = {kNegative, 0.0f};
  }
}

inline void attend(const Attention& a, int64_t block, int64_t first_head, int64_t num_heads, const Piece* pieces,
                   int64_t num_pieces, const Partial* out, void* memory) {
  const int64_t stride = padded(a.head_dim), rows = a.query_counts[block] * a.group;
  int64_t bytes;
  const Scratch s = divide(static_cast<char*>(memory), rows, stride, num_pieces * a.split_pages, &bytes);
  bool rotates = false;
  for (int64_t i = 0; i < num_pieces; ++i) rotates |= rotates_any(a.formats[pieces[i].format_id]);
  for (int64_t t = 0; t < kBlock; ++t) {  // what pads vectors, and is multiplied with zeros
    for (int64_t d = a.head_dim; d < stride; ++d) s.k[t * stride + d] = s.v[t * stride + d] = 0.0f;
  }
  const int64_t num_pages = find_pages(a, pieces, num_pieces, s.pages);
  for (int64_t i = 0; i < kAhead && i < num_pages; ++i) prefetch_page(a, s.pages[i], first_head);
  for (int64_t head = first_head; head < first_head + num_heads; ++head) {
    const Partial& own = out[head - first_head];
    take_queries(a, a.query_starts[block], rows, head, rotates, s);
    std::memset(own.acc, 0, rows * stride * sizeof(float));
    Walk walk{a, rows, stride, a.query_positions[block], {s.plain, s.rotated},
              {own.acc, rotates ? s.rotated_acc : nullptr}, s.rows, {}, s.transposed};
    walk.unpacked.k = s.k, walk.unpacked.v = s.v, walk.unpacked.stride = stride;
    const Course course{s.pages, num_pages, head, first_head + num_heads};
    for (int64_t i = 0, page = 0; i < num_pieces; ++i) {
      attend_piece(walk, course, pieces[i], page);
      page += (a.num_tokens[pieces[i].split] + a.page_size - 1) / a.page_size;
    }
    for (int64_t r = 0; r < rows; ++r) {
      own.m[r] = s.rows[r].m, own.l[r] = s.rows[r].l;
      if (!rotates) continue;
      rotate(s.rotated_acc + r * stride, a.head_dim, a.rotation_block);
      for (int64_t d = 0; d < a.head_dim; ++d) own.acc[r * stride + d] += s.rotated_acc[r * stride + d];
    }
  }
}

inline void merge(const Attention& a, int64_t block, int64_t head, const Partial* parts, int64_t num_parts, float* m,
                  float* l, float* acc) {
  const int64_t stride = padded(a.head_dim), rows = a.query_counts[block] * a.group;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = place_of_row(a, a.query_starts[block], head, r);
    float* own = acc + at * a.head_dim;
    float so_far = parts[0].m[r], sum_so_far = parts[0].l[r];
    for (int64_t d = 0; d < a.head_dim; ++d) own[d] = parts[0].acc[r * stride + d];
    for (int64_t i = 1; i < num_parts; ++i) {
      const float other = parts[i].m[r], both = other > so_far ? other : so_far;
      const float mine = exp(splat(so_far - both))[0], theirs = exp(splat(other - both))[0];
      sum_so_far = sum_so_far * mine + parts[i].l[r] * theirs;
      for (int64_t d = 0; d < a.head_dim; ++d) own[d] = own[d] * mine + parts[i].acc[r * stride + d] * theirs;
      so_far = both;
    }
    m[at] = so_far, l[at] = sum_so_far;
  }
}

}  // namespace fineserve::ISA
