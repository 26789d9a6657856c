// What XLA calls: the kernels as custom calls, and which instruction set's are used.

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "interface.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace fineserve {
namespace {

// -- instruction sets --------------------------------------------------------------------------------------------------

struct Choice {
  const Kernels* kernels;
  bool supported;
};

// The best ones first.
std::vector<Choice> find_kernels() {
  std::vector<Choice> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  found.push_back({&kAvx512Bf16, vnni && __builtin_cpu_supports("avx512bf16")});
  found.push_back({&kAvx512Vnni, vnni});
  found.push_back({&kAvx512, avx512});
  found.push_back({&kAvx2, avx2});
#endif
  found.push_back({&kBaseline, true});
  return found;
}

const std::vector<Choice>& all_kernels() {
  static const std::vector<Choice> found = find_kernels();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* own = chosen.load(std::memory_order_relaxed);
  if (own) return *own;
  for (const Choice& choice : all_kernels()) {
    if (choice.supported) {
      chosen.store(choice.kernels, std::memory_order_relaxed);
      return *choice.kernels;
    }
  }
  return kBaseline;
}

// -- memory ------------------------------------------------------------------------------------------------------------

constexpr int64_t kLine = 64;  // bytes of a cache line

// Memory of a thread that grows as it is asked for more, and begins at a cache line.
template <int PURPOSE>
void* scratch(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + kLine) memory.resize(bytes + kLine);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (kLine - address % kLine) % kLine;
}

enum Purpose { kOfTask, kOfCall };

// -- attention ---------------------------------------------------------------------------------------------------------

// Tokens after which attention begins a new sum, so that threads can share a row. It does not depend on the batch, so that
// a row's result does not either. Chunks have threads enough without, and long sums to keep.
constexpr int64_t kDecodeTokens = 256, kChunkTokens = 4096;
constexpr int64_t kTasksOfThread = 4;  // so that all end at about the same time

struct Run {
  int64_t block, first_piece, num_pieces;
};

// The runs of one query block.
struct Runs {
  int64_t first, count;
};

struct Plan {
  std::vector<Piece> pieces;
  std::vector<Run> runs;
  std::vector<Runs> of_block;       // of the blocks that have any
  std::vector<int64_t> block_of_run;  // index into `of_block`
  std::vector<int64_t> offsets;     // where a run's parts begin, in floats: one for each KV head
  int64_t num_floats = 0;
};

// Floats of a part: `acc`, then m and l.
int64_t part_floats(int64_t rows, int64_t stride) { return rows * (stride + 2); }

void end_run(const Attention& a, Plan& plan, int64_t block, int64_t first_piece, int64_t stride) {
  const int64_t end = plan.pieces.size();
  plan.runs.push_back({block, first_piece, end - first_piece});
  plan.block_of_run.push_back(plan.of_block.size() - 1);
  ++plan.of_block.back().count;
  plan.offsets.push_back(plan.num_floats);
  plan.num_floats += a.kv_heads * part_floats(a.query_counts[block] * a.group, stride);
}

bool has_codecs(const Format& f) { return f.keys.codec != kNone && f.values.codec != kNone; }

// The KV splits of each block, in order, in runs of so many tokens; formats without a codec are left out.
Plan make_plan(const Attention& a, int64_t num_formats, int64_t run_tokens, int64_t stride) {
  Plan plan;
  for (int64_t block = 0; block < a.num_query_blocks; ++block) {
    if (a.query_counts[block] < 1) continue;
    plan.of_block.push_back({static_cast<int64_t>(plan.runs.size()), 0});
    int64_t first = plan.pieces.size(), tokens = 0;
    for (int64_t i = 0; i < a.tiles_per_query_block; ++i) {
      const int64_t tile = a.query_block_tiles[block * a.tiles_per_query_block + i];
      if (tile >= a.max_tiles) break;
      const int32_t format_id = a.format_ids[tile];
      if (format_id >= num_formats || !has_codecs(a.formats[format_id])) continue;
      for (int64_t split = tile * a.splits; split < (tile + 1) * a.splits; ++split) {
        if (a.segment_slots[split] / a.segments_per_row != block) continue;
        if (tokens >= run_tokens) {
          end_run(a, plan, block, first, stride);
          first = plan.pieces.size(), tokens = 0;
        }
        plan.pieces.push_back({split, format_id});
        tokens += a.num_tokens[split];
      }
    }
    if (tokens) end_run(a, plan, block, first, stride);
    if (!plan.of_block.back().count) plan.of_block.pop_back();
  }
  return plan;
}

// Tasks are runs, all KV heads one after the other, since these lie side by side in a page; or single heads of runs, where
// there would be too few tasks else.
void attend_all(ffi::ThreadPool& pool, const Attention& a, int64_t num_formats, bool decodes, float* m, float* l,
                float* acc) {
  const Kernels& own = kernels();
  const int64_t stride = (a.head_dim + own.width - 1) / own.width * own.width;
  const Plan plan = make_plan(a, num_formats, decodes ? kDecodeTokens : kChunkTokens, stride);
  const int64_t num_runs = plan.runs.size();
  const int64_t heads = num_runs < kTasksOfThread * pool.num_threads() ? 1 : a.kv_heads, shares = a.kv_heads / heads;
  auto* memory = static_cast<float*>(scratch<kOfCall>(plan.num_floats * sizeof(float)));
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[plan.of_block.size() * shares]);
  for (size_t i = 0; i < plan.of_block.size() * shares; ++i) {
    left[i].store(plan.of_block[i / shares].count, std::memory_order_relaxed);
  }
  const auto part = [&](int64_t run, int64_t head, int64_t rows) {
    float* start = memory + plan.offsets[run] + head * part_floats(rows, stride);
    return Partial{start + rows * stride, start + rows * (stride + 1), start};
  };
  run_tasks(pool, num_runs * shares, [&](int64_t i) {
    const int64_t number = i / shares, share = i % shares, first_head = share * heads;
    const Run& run = plan.runs[number];
    const int64_t rows = a.query_counts[run.block] * a.group;
    std::vector<Partial> parts;
    for (int64_t head = first_head; head < first_head + heads; ++head) parts.push_back(part(number, head, rows));
    own.attend(a, run.block, first_head, heads, &plan.pieces[run.first_piece], run.num_pieces, parts.data(),
               scratch<kOfTask>(own.attend_scratch(a, rows, run.num_pieces)));
    const int64_t of_block = plan.block_of_run[number];
    if (left[of_block * shares + share].fetch_sub(1, std::memory_order_acq_rel) != 1) return;  // the last one merges
    const Runs& runs = plan.of_block[of_block];
    for (int64_t head = first_head; head < first_head + heads; ++head) {
      parts.clear();
      for (int64_t r = 0; r < runs.count; ++r) parts.push_back(part(runs.first + r, head, rows));
      own.merge(a, run.block, head, parts.data(), runs.count, m, l, acc);
    }
  });
}

using I32 = ffi::Buffer<ffi::S32>;

// The keys, or values, of a format, out of what `layouts` in `codecs.py` lists of all formats, one after the other.
Side side_of(ffi::Span<const int64_t> sides, size_t format) {
  const int64_t* own = sides.begin() + format * (3 + kMaxScaleArrays);
  Side side{own[0], own[1], own[2], {}};
  for (int i = 0; i < kMaxScaleArrays; ++i) side.scale_starts[i] = own[3 + i];
  return side;
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::U16> arena, I32 layer,
                  I32 segment_slots, I32 pages, I32 num_tokens, I32 positions, I32 format_ids, I32 query_block_tiles,
                  I32 query_starts, I32 query_counts, I32 query_positions, ffi::ResultBuffer<ffi::F32> m,
                  ffi::ResultBuffer<ffi::F32> l, ffi::ResultBuffer<ffi::F32> acc, int64_t page_size,
                  int64_t segments_per_row, int64_t window, float soft_cap, bool decodes, int64_t rotation_block,
                  ffi::Span<const int64_t> layer_words, ffi::Span<const int64_t> keys,
                  ffi::Span<const int64_t> values) {
  const auto shape = q.dimensions();
  const size_t num_formats = layer_words.size(), size_of_sides = num_formats * (3 + kMaxScaleArrays);
  if (shape.size() != 4 || keys.size() != size_of_sides || values.size() != size_of_sides || pages.dimensions().size() != 3 ||
      arena.dimensions().size() < 2) {
    return ffi::Error::InvalidArgument("attention was called with arrays of other shapes than it takes");
  }
  std::vector<Format> formats(num_formats);
  for (size_t f = 0; f < num_formats; ++f) {
    formats[f] = {layer_words[f], side_of(keys, f), side_of(values, f)};
  }
  Attention a{};
  a.num_queries = shape[0], a.kv_heads = shape[1], a.group = shape[2], a.head_dim = shape[3];
  a.page_size = page_size, a.rotation_block = rotation_block;
  a.unit_words = arena.element_count() / arena.dimensions()[0];
  a.max_tiles = pages.dimensions()[0], a.splits = pages.dimensions()[1], a.split_pages = pages.dimensions()[2];
  a.num_query_blocks = query_block_tiles.dimensions()[0];
  a.tiles_per_query_block = query_block_tiles.dimensions()[1];
  a.segments_per_row = segments_per_row, a.window = window, a.soft_cap = soft_cap;
  a.layer = layer.typed_data()[0];
  a.formats = formats.data(), a.q = q.typed_data(), a.arena = arena.typed_data();
  a.segment_slots = segment_slots.typed_data(), a.pages = pages.typed_data(), a.num_tokens = num_tokens.typed_data();
  a.positions = positions.typed_data(), a.format_ids = format_ids.typed_data();
  a.query_block_tiles = query_block_tiles.typed_data(), a.query_starts = query_starts.typed_data();
  a.query_counts = query_counts.typed_data(), a.query_positions = query_positions.typed_data();
  float *own_m = m->typed_data(), *own_l = l->typed_data(), *own_acc = acc->typed_data();
  for (size_t i = 0; i < m->element_count(); ++i) own_m[i] = -1e30f, own_l[i] = 0.0f;
  std::memset(own_acc, 0, acc->size_bytes());
  attend_all(pool, a, num_formats, decodes, own_m, own_l, own_acc);
  return ffi::Error::Success();
}

ffi::Error AttendWithin(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> own_k,
                        ffi::Buffer<ffi::F32> own_v, ffi::Buffer<ffi::F32> earlier_k, ffi::Buffer<ffi::F32> earlier_v,
                        I32 chunk_of_page, ffi::ResultBuffer<ffi::F32> m, ffi::ResultBuffer<ffi::F32> l,
                        ffi::ResultBuffer<ffi::F32> acc, int64_t window, float soft_cap) {
  const auto shape = q.dimensions();
  const int64_t pages = chunk_of_page.element_count();
  if (shape.size() != 4 || !pages || shape[0] % pages ||
      own_k.element_count() != static_cast<size_t>(shape[0] * shape[1] * shape[3])) {
    return ffi::Error::InvalidArgument("attention in chunks was called with arrays of other shapes than it takes");
  }
  Attention a{};
  a.num_queries = shape[0], a.kv_heads = shape[1], a.group = shape[2], a.head_dim = shape[3];
  a.page_size = a.num_queries / pages, a.window = window, a.soft_cap = soft_cap, a.q = q.typed_data();
  const Within within{own_k.typed_data(), own_v.typed_data(), earlier_k.typed_data(), earlier_v.typed_data(),
                      chunk_of_page.typed_data()};
  const Kernels& own = kernels();
  run_tasks(pool, pages * a.kv_heads, [&](int64_t i) {
    const int64_t page = pages - 1 - i / a.kv_heads;  // the last see most
    own.attend_within(a, within, page, i % a.kv_heads, scratch<kOfTask>(own.attend_within_scratch(a)), m->typed_data(),
                      l->typed_data(), acc->typed_data());
  });
  return ffi::Error::Success();
}

// -- products ----------------------------------------------------------------------------------------------------------

constexpr int64_t kOutputs = 64;         // of a task, at least
constexpr int64_t kPrepared = 1 << 14;  // numbers that a task prepares, at least

// Runs `body(first, last)` for the pieces of `count` things: several for each thread, but of at least so many things.
template <class Body>
void run_pieces(ffi::ThreadPool& pool, int64_t count, int64_t least, const Body& body) {
  const int64_t share = count / (8 * pool.num_threads()) / least * least, size = share < least ? least : share;
  run_tasks(pool, (count + size - 1) / size, [&](int64_t i) {
    body(i * size, (i + 1) * size < count ? (i + 1) * size : count);
  });
}

bool is_zero(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] != 0.0f) return false;  // NaN, too
  }
  return true;
}

ffi::Error multiply(ffi::ThreadPool& pool, Weights kind, ffi::Buffer<ffi::F32>& x, const void* kernel,
                    const void* scale, const void* minimum, ffi::ResultBuffer<ffi::F32>& y) {
  const Kernels& own = kernels();
  const int64_t all_rows = x.dimensions()[0], inner = x.dimensions()[1], out = y->dimensions()[1];
  const int64_t row_bytes = own.row_bytes[kind](inner), of_codes = (all_rows * row_bytes + kLine - 1) / kLine * kLine;
  char* memory = static_cast<char*>(scratch<kOfCall>(of_codes + all_rows * (sizeof(RowScale) + sizeof(int32_t))));
  auto* scales = reinterpret_cast<RowScale*>(memory + of_codes);
  auto* places = reinterpret_cast<int32_t*>(scales + all_rows);
  int64_t rows = 0;
  for (int64_t row = 0; row < all_rows; ++row) {
    if (is_zero(x.typed_data() + row * inner, inner)) {
      std::memset(y->typed_data() + row * out, 0, out * sizeof(float));
    } else {
      places[rows++] = row;
    }
  }
  if (!rows) return ffi::Error::Success();
  const Activations activations{rows, all_rows, inner, x.typed_data(), places, memory, scales};
  run_pieces(pool, rows, kPrepared / inner + 1, [&](int64_t first, int64_t last) {
    own.prepare[kind](activations, first, last, scratch<kOfTask>(row_bytes));
  });
  const Products products{activations, out, kernel, scale, minimum, y->typed_data()};
  run_pieces(pool, out, kOutputs, [&](int64_t first, int64_t last) {
    own.multiply[kind](products, first, last, scratch<kOfTask>(own.multiply_scratch[kind](all_rows, inner)));
  });
  return ffi::Error::Success();
}

ffi::Error MultiplyBFloat16(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::BF16> kernel,
                            ffi::ResultBuffer<ffi::F32> y) {
  return multiply(pool, kWeightsBFloat16, x, kernel.untyped_data(), nullptr, nullptr, y);
}

ffi::Error MultiplyInt8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> kernel,
                        ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> y) {
  return multiply(pool, kWeightsInt8, x, kernel.untyped_data(), scale.untyped_data(), nullptr, y);
}

ffi::Error MultiplyInt4(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> kernel,
                        ffi::Buffer<ffi::F16> scale, ffi::Buffer<ffi::F16> minimum, ffi::ResultBuffer<ffi::F32> y) {
  return multiply(pool, kWeightsInt4, x, kernel.untyped_data(), scale.untyped_data(), minimum.untyped_data(), y);
}

}  // namespace
}  // namespace fineserve

#pragma GCC visibility push(default)

extern "C" {

// Raised whenever a custom call takes other arguments: `library.py` names the one it fits.
int fineserve_interface() { return 3; }

// The instruction set whose kernels are used.
const char* fineserve_instruction_set() { return fineserve::kernels().name; }

// The number-th of those that this processor has, the best first; null behind the last.
const char* fineserve_supported(int number) {
  for (const auto& choice : fineserve::all_kernels()) {
    if (choice.supported && number-- == 0) return choice.kernels->name;
  }
  return nullptr;
}

// Uses the kernels of that instruction set from now on; returns whether this processor has it.
int fineserve_use(const char* name) {
  for (const auto& choice : fineserve::all_kernels()) {
    if (choice.supported && std::strcmp(choice.kernels->name, name) == 0) {
      fineserve::chosen.store(choice.kernels);
      return 1;
    }
  }
  return 0;
}

}  // extern "C"

namespace {
using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fineserve_attend, fineserve::Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("page_size")
                                  .Attr<int64_t>("segments_per_row")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap")
                                  .Attr<bool>("decodes")
                                  .Attr<int64_t>("rotation_block")
                                  .Attr<ffi::Span<const int64_t>>("layer_words")
                                  .Attr<ffi::Span<const int64_t>>("keys")
                                  .Attr<ffi::Span<const int64_t>>("values"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fineserve_attend_within, fineserve::AttendWithin,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fineserve_multiply_bf16, fineserve::MultiplyBFloat16,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::Buffer<ffi::BF16>>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fineserve_multiply_int8, fineserve::MultiplyInt8,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<ffi::Buffer<ffi::S8>>().Arg<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fineserve_multiply_int4, fineserve::MultiplyInt4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Ret<Floats>());

#pragma GCC visibility pop
