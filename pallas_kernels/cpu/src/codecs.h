// Unpacking the pages of each KV format into rows of floats: what `formats/` does in XLA.
#pragma once

#include "interface.h"
#include "vectors.h"

namespace fineserve::ISA {

constexpr int kBlock = 64;  // tokens that are unpacked at a time

// Keys and values of up to `kBlock` tokens of one head: key = k * k_scale, value = v * v_scale + v_zero_point.
struct Unpacked {
  float *k, *v;  // [kBlock, stride]
  int64_t stride;
  float k_scale[kBlock], v_scale[kBlock], v_zero_point[kBlock];
};

// Where some tokens of one head of a page are.
struct Place {
  const uint16_t* layer;  // the page's layer
  int64_t head, token;    // the first token, counted in the page
  int64_t count;          // tokens
  int64_t row;            // where they go in `Unpacked`
};

INLINE const uint16_t* words_of(const Attention& a, const Side& side, const Place& p) {
  return p.layer + side.start + (p.head * a.page_size + p.token) * side.vector_words;
}

// Lane `lane` of packed words becomes the slice of the vector at `lane * width`; the widths need not be multiples of W.
template <class Wide, class Single>
INLINE void unpack_vectors(const uint16_t* words, int64_t vector_words, int64_t width, int64_t count, float* to,
                           int64_t stride, Wide wide, Single single) {
  for (int64_t t = 0; t < count; ++t, words += vector_words, to += stride) {
    int64_t i = 0;
    for (; i + W <= width; i += W) wide(words + i, to + i);
    for (; i < width; ++i) single(words + i, to + i);
  }
}

INLINE void read_token_scales(const Attention& a, const Side& side, const Place& p, float* to) {
  const uint16_t* from = p.layer + side.scale_starts[0] + p.head * a.page_size + p.token;
  for (int64_t t = 0; t < p.count; ++t) to[p.row + t] = bf16(from[t]);
}

INLINE void unpack_float32(const uint16_t* words, int64_t dim, int64_t count, float* to, int64_t stride) {
  unpack_vectors(
      words, 2 * dim, dim, count, to, stride,
      [=](const uint16_t* w, float* o) { store(o, bits<F>(widen(w) << 16 | widen(w + dim))); },
      [=](const uint16_t* w, float* o) { *o = bits<float>(static_cast<uint32_t>(w[0]) << 16 | w[dim]); });
}

INLINE void unpack_bfloat16(const uint16_t* words, int64_t dim, int64_t count, float* to, int64_t stride) {
  unpack_vectors(
      words, dim, dim, count, to, stride, [](const uint16_t* w, float* o) { store(o, bf16(widen(w))); },
      [](const uint16_t* w, float* o) { *o = bf16(*w); });
}

INLINE void unpack_float16(const uint16_t* words, int64_t dim, int64_t count, float* to, int64_t stride) {
  unpack_vectors(
      words, dim, dim, count, to, stride, [](const uint16_t* w, float* o) { store(o, fp16(widen(w))); },
      [](const uint16_t* w, float* o) { *o = fp16(*w); });
}

INLINE void unpack_int8(const uint16_t* words, int64_t dim, int64_t count, float* to, int64_t stride) {
  const int64_t width = dim / 2;
  unpack_vectors(
      words, width, width, count, to, stride,
      [=](const uint16_t* w, float* o) {
        const I high = bits<I>(widen(w) << 16);
        store(o, floats(high << 8 >> 24));
        store(o + width, floats(high >> 24));
      },
      [=](const uint16_t* w, float* o) {
        o[0] = static_cast<int8_t>(*w & 0xFF);
        o[width] = static_cast<int8_t>(*w >> 8);
      });
}

INLINE void unpack_float8(const uint16_t* words, int64_t dim, int64_t count, float* to, int64_t stride) {
  const int64_t width = dim / 2;
  unpack_vectors(
      words, width, width, count, to, stride,
      [=](const uint16_t* w, float* o) {
        const U wide = widen(w);
        store(o, e4m3(wide & 0xFF));
        store(o + width, e4m3(wide >> 8));
      },
      [=](const uint16_t* w, float* o) {
        o[0] = e4m3(static_cast<uint32_t>(*w & 0xFF));
        o[width] = e4m3(static_cast<uint32_t>(*w >> 8));
      });
}

// The number that a 4-bit code is, of the lowest bits of each lane.
INLINE F nibble(U shifted) {
#if defined(__AVX512F__)
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return bits<F>(_mm512_permutexvar_ps(bits<__m512i>(shifted), numbers));  // it looks at the lowest 4 bits only
#else
  return floats(shifted & 0xF);
#endif
}

INLINE void unpack_int4_values(const uint16_t* words, int64_t dim, int64_t count, float* to, int64_t stride) {
  const int64_t width = dim / 4;
  unpack_vectors(
      words, width, width, count, to, stride,
      [=](const uint16_t* w, float* o) {
        const U wide = widen(w);
        store(o, nibble(wide));
        store(o + width, nibble(wide >> 4));
        store(o + 2 * width, nibble(wide >> 8));
        store(o + 3 * width, nibble(wide >> 12));
      },
      [=](const uint16_t* w, float* o) {
        for (int lane = 0; lane < 4; ++lane) o[lane * width] = static_cast<float>(*w >> 4 * lane & 0xF);
      });
}

INLINE float zero_point(uint16_t word, float unit) { return static_cast<float>(static_cast<int8_t>(word >> 8)) * unit; }
INLINE float scale(uint16_t word, float unit) { return static_cast<float>(word & 0xFF) * unit; }

// Keys have a scale and a zero point for each channel, applied here.
INLINE void unpack_int4_keys(const Attention& a, const Side& keys, const Place& p, float* to, int64_t stride) {
  const int64_t width = a.head_dim / 4;
  const float zero_point_unit = bf16(p.layer[keys.scale_starts[4] + p.head]);
  const float scale_unit = bf16(p.layer[keys.scale_starts[5] + p.head]);
  const uint16_t* words = words_of(a, keys, p);
  const uint16_t* of_lane[4];
  for (int lane = 0; lane < 4; ++lane) of_lane[lane] = p.layer + keys.scale_starts[lane] + p.head * width;
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    F scales[4], zero_points[4];
    for (int lane = 0; lane < 4; ++lane) {
      const U code = widen(of_lane[lane] + i);
      scales[lane] = floats(code & 0xFF) * scale_unit;
      zero_points[lane] = floats(bits<I>(code << 16) >> 24) * zero_point_unit;
    }
    for (int64_t t = 0; t < p.count; ++t) {
      const U wide = widen(words + t * width + i);
      float* o = to + t * stride + i;
      store(o, nibble(wide) * scales[0] + zero_points[0]);
      store(o + width, nibble(wide >> 4) * scales[1] + zero_points[1]);
      store(o + 2 * width, nibble(wide >> 8) * scales[2] + zero_points[2]);
      store(o + 3 * width, nibble(wide >> 12) * scales[3] + zero_points[3]);
    }
  }
  for (; i < width; ++i) {
    for (int lane = 0; lane < 4; ++lane) {
      const float s = scale(of_lane[lane][i], scale_unit), z = zero_point(of_lane[lane][i], zero_point_unit);
      for (int64_t t = 0; t < p.count; ++t) {
        to[t * stride + lane * width + i] = static_cast<float>(words[t * width + i] >> 4 * lane & 0xF) * s + z;
      }
    }
  }
}

INLINE void read_int4_value_scales(const Attention& a, const Side& values, const Place& p, Unpacked& u) {
  const uint16_t* codes = p.layer + values.scale_starts[0] + p.head * a.page_size + p.token;
  const float zero_point_unit = bf16(p.layer[values.scale_starts[1] + p.head]);
  const float scale_unit = bf16(p.layer[values.scale_starts[2] + p.head]);
  for (int64_t t = 0; t < p.count; ++t) {
    u.v_scale[p.row + t] = scale(codes[t], scale_unit);
    u.v_zero_point[p.row + t] = zero_point(codes[t], zero_point_unit);
  }
}

// Which factors codecs leave to logits and weights.
INLINE bool has_token_scale(int64_t codec) { return codec == kInt8 || codec == kFloat8; }
INLINE bool has_k_scale(const Format& f) { return has_token_scale(f.keys.codec); }
INLINE bool has_v_scale(const Format& f) { return has_token_scale(f.values.codec) || f.values.codec == kInt4; }
INLINE bool has_zero_point(const Format& f) { return f.values.codec == kInt4; }

// Some tokens' keys, or values, in a codec that keys and values have alike.
inline void unpack_side(const Attention& a, const Side& side, const Place& p, float* to, int64_t stride,
                        float* scales) {
  const uint16_t* words = words_of(a, side, p);
  switch (side.codec) {
    case kFloat32: unpack_float32(words, a.head_dim, p.count, to, stride); break;
    case kBFloat16: unpack_bfloat16(words, a.head_dim, p.count, to, stride); break;
    case kFloat16: unpack_float16(words, a.head_dim, p.count, to, stride); break;
    case kInt8: unpack_int8(words, a.head_dim, p.count, to, stride); break;
    default: unpack_float8(words, a.head_dim, p.count, to, stride);
  }
  if (has_token_scale(side.codec)) read_token_scales(a, side, p, scales);
}

// Some tokens of a page, keys and values, into `u`.
inline void unpack(const Attention& a, const Format& f, const Place& p, Unpacked& u) {
  float *k = u.k + p.row * u.stride, *v = u.v + p.row * u.stride;
  if (f.keys.codec == kInt4) {
    unpack_int4_keys(a, f.keys, p, k, u.stride);
  } else {
    unpack_side(a, f.keys, p, k, u.stride, u.k_scale);
  }
  if (f.values.codec == kInt4) {
    unpack_int4_values(words_of(a, f.values, p), a.head_dim, p.count, v, u.stride);
    read_int4_value_scales(a, f.values, p, u);
  } else {
    unpack_side(a, f.values, p, v, u.stride, u.v_scale);
  }
}

}  // namespace fineserve::ISA
