// What the kernels of one instruction set offer, and what they are given.
//
// Plain structs: the sources that are compiled for an instruction set share no function of the C++ library with the
// rest, since a linker keeps one copy of such, perhaps one that this processor cannot run.
#pragma once

#include <cstdint>

namespace fineserve {

// -- attention ---------------------------------------------------------------------------------------------------------

// The codecs, numbered as `codecs.py` does. int4 is by channel for keys, and by token for values.
enum Codec : int64_t { kNone = -1, kFloat32 = 0, kBFloat16, kFloat16, kInt8, kFloat8, kInt4 };

constexpr int kMaxScaleArrays = 6;

// How the keys of a format's pages lie, or the values, in words.
struct Side {
  int64_t codec;
  int64_t start;                         // from a layer's start
  int64_t vector_words;                  // of a head vector
  int64_t scale_starts[kMaxScaleArrays]; // from a layer's start
};

// How a format's pages lie: `FormatSizes`.
struct Format {
  int64_t layer_words;  // from one layer of a page to the next
  Side keys, values;
};

// A batch, cut as `Tiles` says, and the arena. Sizes of arrays are in the comments of `Tiles`.
struct Attention {
  int64_t kv_heads, head_dim, page_size, unit_words, group, rotation_block;
  int64_t split_pages, splits, max_tiles, num_query_blocks, tiles_per_query_block, segments_per_row, num_queries;
  int64_t window;    // 0: none
  float soft_cap;    // 0: none
  int64_t layer;
  const Format* formats;
  const float* q;    // [num_queries, kv_heads, group, head_dim]
  const uint16_t* arena;
  const int32_t *segment_slots, *pages, *num_tokens, *positions, *format_ids, *query_block_tiles;
  const int32_t *query_starts, *query_counts, *query_positions;
};

// The keys and values of a step's own tokens, each f32[kv_heads, num_queries, head_dim]: as tokens of their own page see
// them, and as those of later pages do.
struct Within {
  const float *own_k, *own_v, *earlier_k, *earlier_v;
  const int32_t* chunk_of_page;  // [num_queries / page_size]
};

// What a query block attends to, one KV split: its number among those of all tiles, and its format.
struct Piece {
  int64_t split;
  int32_t format_id;
};

// Partial attention of the query rows of one block and KV head: row i is query i / group, head i % group.
struct Partial {
  float *m, *l;  // [rows]
  float* acc;    // [rows, padded head_dim]
};

// -- products ----------------------------------------------------------------------------------------------------------

// What a row of int8 activations was divided by, and what its sums have to start with.
struct RowScale {
  float scale;
  int32_t start;
};

// Prepared once and read by every task.
//
// Rows of zeros, such as those that pad a step, are not multiplied. Which kernel multiplies is decided by how many rows
// there are with them, so that a row's bits do not depend on what is beside it.
struct Activations {
  int64_t rows, all_rows, inner;  // rows that are not zeros, and all
  const float* x;        // [all_rows, inner]
  const int32_t* places; // [rows], of each its row of `x`
  void* codes;       // what `prepare` makes of them, `row_bytes` a row
  RowScale* scales;  // int8: [rows]
};

// Matrices [out, inner] whose rows lie one behind the other.
struct Products {
  Activations activations;
  int64_t out;
  const void* kernel;
  const void* scale;    // int8: f32[out]; int4: f16[out, inner / 32]
  const void* minimum;  // int4: f16[out, inner / 32]
  float* y;             // [all_rows, out]
};

enum Weights : int64_t { kWeightsBFloat16 = 0, kWeightsInt8, kWeightsInt4, kNumWeights };

// -- the kernels of an instruction set ---------------------------------------------------------------------------------

struct Kernels {
  const char* name;
  int64_t width;  // floats of a register: head vectors are padded to a multiple of it
  // Scratch memory of `attend`, in bytes.
  int64_t (*attend_scratch)(const Attention&, int64_t rows, int64_t num_pieces);
  // Attention of a query block to some pieces, by themselves, for some KV heads: a part for each.
  void (*attend)(const Attention&, int64_t block, int64_t first_head, int64_t num_heads, const Piece* pieces,
                 int64_t num_pieces, const Partial* parts, void* scratch);
  // Merges parts in order and writes m, l and acc of a block's queries.
  void (*merge)(const Attention&, int64_t block, int64_t head, const Partial* parts, int64_t num_parts, float* m,
                float* l, float* acc);
  // Attention of a page of queries to the tokens of its chunk, for a KV head.
  int64_t (*attend_within_scratch)(const Attention&);
  void (*attend_within)(const Attention&, const Within&, int64_t page, int64_t head, void* scratch, float* m, float* l,
                        float* acc);
  // Bytes of a prepared row, and of the memory that preparing needs besides.
  int64_t (*row_bytes[kNumWeights])(int64_t inner);
  void (*prepare[kNumWeights])(const Activations&, int64_t first, int64_t last, void* row);
  // Outputs `first` to `last` of all rows, with scratch memory of so many bytes.
  int64_t (*multiply_scratch[kNumWeights])(int64_t all_rows, int64_t inner);
  void (*multiply[kNumWeights])(const Products&, int64_t first, int64_t last, void* scratch);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16;
#endif

}  // namespace fineserve
