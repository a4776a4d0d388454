// A block multiplies tiles of 32 query rows (times the heads of a group) and of 32 keys. One tile stays and the others
// move past it: queries stay where a sum over keys is wanted (log-sum-exp, gradient of the query), keys where one over
// rows is (mass, gradient of the key). The logits never leave the block.
//
// A key that is read once meets 12 to 16 rows times the heads of its group. From about 16 products on, float32 FMAs are
// the bound and not memory; that the tiles of further rows read the keys again, from the L2 cache, costs less. Tensor
// cores would lift that bound for 16-bit inputs, but not for float32; the Triton kernels use them.
//
// Where the tiles lie is known on the device alone, so that there are blocks for as many as there could be. Sums have
// an order that depends on the sizes and the layout: no atomics.

#include "document_scores.h"

#include <cfloat>
#include <climits>
#include <cmath>
#include <type_traits>

#include "block_ops.cuh"

namespace rankernel::cuda {
namespace {

using Args = DocumentScoresArgs;
using Op = DocumentScoresOp;

constexpr int kTile = 32;      // query rows times heads, or keys
constexpr int kDepth = 32;     // columns of both tiles that meet at a time
constexpr int kColumns = 128;  // of a gradient that a block computes; the logits are computed anew for the next ones
constexpr int kEnoughBlocks = 512;        // to keep a large device busy
constexpr int kMoving = 4, kStaying = 2;  // logits of a thread

// Query row. Rows are sorted by position, those in no list last.
struct Row {
  int32_t index, position;    // in args.rows; INT_MAX in no list
  int32_t prefix_end, begin;  // sees keys up to its position that are before the one or from the other on
  __device__ bool sees(int key) const { return key <= position && (key < prefix_end || key >= begin); }
};

// sum of exp(z) = sum * exp(peak), and the same with every term times a weight. NaN stays.
struct ExpSum {
  float peak, sum, weighted;
  __device__ void rescale(float to) {
    const float factor = expf(peak - to);
    sum *= factor;
    weighted *= factor;
    peak = to;
  }
  __device__ void add(float z, float weight) {
    if (z > peak) rescale(z);
    const float term = expf(z - peak);
    sum += term;
    weighted += term * weight;
  }
  __device__ void add(ExpSum other) {
    const float to = fmaxf(peak, other.peak);
    rescale(to);
    other.rescale(to);
    sum += other.sum;
    weighted += other.weighted;
  }
};
constexpr ExpSum kEmpty{-FLT_MAX, 0, 0};  // finite, so that -inf may follow

// A term is factor * exp(z - peak); `mean` is what the weights are on average, 0 for document_logsumexp.
struct Softmax {
  float peak, factor, mean;
};

struct Call {
  Args args;
  Op op;
  const float* grad_out;
  void* grad_key;
  bool is_aligned;     // so that vectors of queries and keys can be loaded 16 bytes at a time
  int group, parts;    // query heads of a KV head; what the keys of a list are divided in
  Row* rows;           // [num_rows], sorted
  int32_t* row_begin;  // [num_lists + 2], first of the sorted rows of every list, then of those in none, then num_rows
  ExpSum* sums;        // [parts, num_rows, heads]
  Softmax* softmaxes;  // [num_rows, heads]
  float* partials;     // mass: [KV heads, tokens]; gradient of the query: [parts, num_rows, heads, head_size]

  __host__ __device__ bool is_of_documents() const { return op == Op::kLogSumExp || op == Op::kLogSumExpBackward; }
  bool is_backward() const { return op == Op::kLogSumExpBackward || op == Op::kMassBackward; }
};

struct Range {
  int begin, end;
};

// The largest i < count with f(i) <= value, where f rises; 0 if there is none.
template <class Function>
__device__ int last_at_most(int64_t count, int64_t value, Function f) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (f(middle) <= value ? low : high) = middle;
  }
  return static_cast<int>(low);
}

__device__ int token(const Layout& layout, int segment) {
  const int64_t boundary = segment > layout.num_segments ? layout.num_tokens : layout.cu_seqlens[segment];
  return static_cast<int>(max(int64_t{0}, min(boundary, layout.num_tokens)));
}

__device__ int first_segment(const Layout& layout, int list) {
  return static_cast<int>(max(int64_t{0}, min(int64_t{layout.list_offsets[list]}, layout.num_segments)));
}

// Runs of any lengths, one after the other, are cut in tiles that start where they do. Numbering those of run i from
// begin / kTile + i on leaves room for all and needs no table; some numbers have an empty tile.
__device__ int first_tile(int64_t begin, int run) { return static_cast<int>(begin / kTile) + run; }
__host__ __device__ int64_t max_tiles(int64_t size, int64_t runs) { return size / kTile + runs; }

// Tiles of the keys: every segment is a run, and tokens after the last segment are one more.
__device__ int first_tile_of(const Layout& layout, int segment) { return first_tile(token(layout, segment), segment); }

struct KeyTile {
  int segment, begin, end;
};

__device__ KeyTile key_tile(const Layout& layout, int number, int segment) {
  const int begin = token(layout, segment) + (number - first_tile_of(layout, segment)) * kTile;
  return {segment, begin, min(begin + kTile, token(layout, segment + 1))};
}

__device__ int segment_of_tile(const Layout& layout, int number) {
  return last_at_most(layout.num_segments + 1, number, [&](int s) { return first_tile_of(layout, s); });
}

// Segments of a list that an op looks at: its documents, or with prefix and tail all of them.
__device__ Range segments_of(const Call& call, int list) {
  const Layout& layout = call.args.layout;
  if (list == layout.num_lists) return {0, 0};
  const int left_out = call.is_of_documents();
  return {first_segment(layout, list) + left_out, first_segment(layout, list + 1) - left_out};
}

// Tiles of the keys of these segments.
__device__ Range tiles_of(const Layout& layout, Range segments) {
  if (segments.begin >= segments.end) return {0, 0};
  return {first_tile_of(layout, segments.begin), first_tile_of(layout, segments.end)};
}

__device__ Range part_of(Range tiles, int part, int parts) {
  const int64_t size = tiles.end - tiles.begin;
  return {tiles.begin + static_cast<int>(size * part / parts),
          tiles.begin + static_cast<int>(size * (part + 1) / parts)};
}

template <class Function>
__device__ void for_key_tiles(const Layout& layout, Range tiles, Function f) {
  if (tiles.begin >= tiles.end) return;
  int segment = segment_of_tile(layout, tiles.begin);
  for (int number = tiles.begin; number < tiles.end; ++number) {
    while (segment < layout.num_segments && first_tile_of(layout, segment + 1) <= number) ++segment;
    const KeyTile tile = key_tile(layout, number, segment);
    if (tile.begin < tile.end) f(tile);
  }
}

// Items are the sorted rows times the heads of a group; every list is a run of them, and rows in no list are one more.
struct ItemTile {
  int list, begin, end;
};

__device__ ItemTile item_tile(const Call& call, int number) {
  const auto first = [&](int list) { return first_tile(call.row_begin[list] * call.group, list); };
  const int list = last_at_most(call.args.layout.num_lists + 1, number, first);
  const int begin = call.row_begin[list] * call.group + (number - first(list)) * kTile;
  return {list, begin, min(begin + kTile, call.row_begin[list + 1] * call.group)};
}

// Items of the list that a segment is in, none if the op does not look at the segment; and which document it is.
struct Lookers {
  Range items;
  int document;
};

__device__ Lookers lookers_of(const Call& call, int segment) {
  const Layout& layout = call.args.layout;
  const int list = last_at_most(layout.num_lists, segment, [&](int l) { return first_segment(layout, l); });
  const Range segments = segments_of(call, list);
  if (segment < segments.begin || segment >= segments.end) return {{0, 0}, 0};
  return {{call.row_begin[list] * call.group, call.row_begin[list + 1] * call.group}, segment - segments.begin};
}

// What a block sees of one KV head.
template <class T>
struct Heads {
  const Call& call;
  int kv_head;

  __device__ const Row& row(int item) const { return call.rows[item / call.group]; }
  __device__ int head(int item) const { return kv_head * call.group + item % call.group; }
  // In [num_rows, heads].
  __device__ int64_t index(int item) const { return row(item).index * call.args.num_query_heads + head(item); }
  __device__ const T* query(int item) const {
    const TokenHeads& query = call.args.query;
    return static_cast<const T*>(query.data) + row(item).index * query.token_stride + head(item) * query.head_stride;
  }
  __device__ const T* key(int token) const {
    const TokenHeads& key = call.args.key;
    return static_cast<const T*>(key.data) + token * key.token_stride + kv_head * key.head_stride;
  }
  __device__ auto queries(int begin, int end) const {
    return [=, *this](int i) { return begin + i < end ? query(begin + i) : nullptr; };
  }
  __device__ auto keys(KeyTile tile) const {
    return [=, *this](int i) { return tile.begin + i < tile.end ? key(tile.begin + i) : nullptr; };
  }
};

using Four = Vector<float>;

// The gap keeps rows that are read together in different banks.
template <int kWidth>
struct alignas(16) Tile {
  float values[kTile][kWidth + 4];
  __device__ Four& at(int row, int column) { return *reinterpret_cast<Four*>(&values[row][column]); }
};

// Columns [begin, begin + kWidth) of vector_of(i) for every i, zeros where there is none.
template <int kWidth, class Function>
__device__ void stage(const Call& call, Function vector_of, int begin, Tile<kWidth>& tile) {
  using T = std::remove_cv_t<std::remove_pointer_t<decltype(vector_of(0))>>;
  constexpr int kSize = Vector<T>::kSize, kVectors = kWidth / kSize;
  const int size = static_cast<int>(call.args.head_size);
  for (int i = threadIdx.x; i < kTile * kVectors; i += kBlock) {
    const int row = i / kVectors, column = i % kVectors * kSize;
    const T* from = vector_of(row);
    Vector<T> vector{};
    if (from && call.is_aligned && begin + column < size) {
      vector = *reinterpret_cast<const Vector<T>*>(from + begin + column);
    } else if (from) {
      for (int j = 0; j < kSize; ++j)
        if (begin + column + j < size) vector.values[j] = from[begin + column + j];
    }
    for (int j = 0; j < kSize; j += 4) {
      Four four;
      for (int k = 0; k < 4; ++k) four.values[k] = static_cast<float>(vector.values[j + k]);
      tile.at(row, column + j) = four;
    }
  }
}

// A thread has kMoving x kStaying logits, 8 and 16 apart. A warp has 4 x 8 threads, which read what they share at once.
static_assert(kBlock == 128 && kTile == 8 * kMoving && kTile == 16 * kStaying);
__device__ int lane_of_8() { return threadIdx.x / 32 % 2 * 4 + threadIdx.x % 32 / 8; }
__device__ int lane_of_16() { return threadIdx.x / 64 * 8 + threadIdx.x % 8; }
__device__ int moving_of(int i) { return lane_of_8() + 8 * i; }
__device__ int staying_of(int j) { return lane_of_16() + 16 * j; }

// z[i][j] = softcap(scale * moving . staying). All threads call, and all have passed what came before when it returns.
template <class Moving, class Staying>
__device__ void logits(const Call& call, Moving moving, Staying staying, float (&z)[kMoving][kStaying]) {
  __shared__ Tile<kDepth> moving_tile, staying_tile;
  for (auto& of_moving : z)
    for (float& sum : of_moving) sum = 0;
  for (int begin = 0; begin < call.args.head_size; begin += kDepth) {
    __syncthreads();
    stage(call, moving, begin, moving_tile);
    stage(call, staying, begin, staying_tile);
    __syncthreads();
    for (int column = 0; column < kDepth; column += 4) {
      Four a[kMoving], b[kStaying];
      for (int i = 0; i < kMoving; ++i) a[i] = moving_tile.at(moving_of(i), column);
      for (int j = 0; j < kStaying; ++j) b[j] = staying_tile.at(staying_of(j), column);
      for (int i = 0; i < kMoving; ++i)
        for (int j = 0; j < kStaying; ++j)
          for (int k = 0; k < 4; ++k) z[i][j] += a[i].values[k] * b[j].values[k];
    }
  }
  for (auto& of_moving : z)
    for (float& sum : of_moving) {
      sum *= call.args.scale;
      if (call.args.softcap > 0) sum = call.args.softcap * tanhf(sum / call.args.softcap);
    }
}

// Sorts the rows: a thread counts those before its own, and one for every list those before the list.
__global__ void sort_rows(const __grid_constant__ Call call) {
  const Layout& layout = call.args.layout;
  const int num_lists = static_cast<int>(layout.num_lists), num_rows = static_cast<int>(call.args.num_rows);
  const int begin = token(layout, first_segment(layout, 0)), end = token(layout, first_segment(layout, num_lists));
  const auto position_of = [&](int row) {
    const int64_t position = call.args.rows[row];
    return begin <= position && position < end ? static_cast<int>(position) : INT_MAX;
  };
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i <= num_lists + 1) {
    int before = 0;
    const int list_begin = i <= num_lists ? token(layout, first_segment(layout, static_cast<int>(i))) : INT_MAX;
    for (int row = 0; row < num_rows; ++row) before += position_of(row) < list_begin;
    call.row_begin[i] = i <= num_lists ? before : num_rows;
  }
  if (i >= num_rows) return;
  const int position = position_of(static_cast<int>(i));
  int before = 0;
  for (int row = 0; row < num_rows; ++row) {
    const int other = position_of(row);
    before += other < position || (other == position && row < i);
  }
  const int segment = last_at_most(layout.num_segments, position, [&](int s) { return token(layout, s); });
  const int list = last_at_most(num_lists, segment, [&](int l) { return first_segment(layout, l); });
  const int prefix = first_segment(layout, list);
  const bool is_causal =
      layout.causal || segment == prefix || segment + 1 == first_segment(layout, min(list + 1, num_lists));
  call.rows[before] = {static_cast<int32_t>(i), position, token(layout, prefix + 1),
                       is_causal ? 0 : token(layout, segment)};
}

// Queries stay. A block for a tile of items, a KV head, and a document (out) or a part of the list's keys (sums).
// Documents are short and many: none is divided.
template <class T>
__global__ void exp_sums(const __grid_constant__ Call call) {
  const Args& args = call.args;
  const int parts = call.is_of_documents() ? static_cast<int>(args.max_documents) : call.parts;
  const int part = blockIdx.x % parts, kv_heads = static_cast<int>(args.num_kv_heads);
  const Heads<T> heads{call, static_cast<int>(blockIdx.x / parts % kv_heads)};
  const ItemTile tile = item_tile(call, blockIdx.x / parts / kv_heads);
  if (tile.begin >= tile.end) return;
  Row rows[kStaying];
  ExpSum mine[kStaying];
  for (int j = 0; j < kStaying; ++j) {
    rows[j] = heads.row(min(tile.begin + staying_of(j), tile.end - 1));
    mine[j] = kEmpty;
  }
  const Range segments = segments_of(call, tile.list);
  const int document = segments.begin + part;
  const Range tiles = call.is_of_documents() ? tiles_of(args.layout, {document, min(document + 1, segments.end)})
                                             : part_of(tiles_of(args.layout, segments), part, parts);
  for_key_tiles(args.layout, tiles, [&](KeyTile keys) {
    float z[kMoving][kStaying];
    logits(call, heads.keys(keys), heads.queries(tile.begin, tile.end), z);
    for (int i = 0; i < kMoving; ++i) {
      const int key = keys.begin + moving_of(i);
      if (key >= keys.end) continue;
      const float weight = call.grad_out ? call.grad_out[key] : 0;
      for (int j = 0; j < kStaying; ++j)
        if (rows[j].sees(key)) mine[j].add(z[i][j], weight);
    }
  });

  __shared__ ExpSum all[kTile][kTile / kMoving];
  for (int j = 0; j < kStaying; ++j) all[staying_of(j)][lane_of_8()] = mine[j];
  __syncthreads();
  const int item = tile.begin + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kTile || item >= tile.end) return;
  ExpSum total = kEmpty;
  for (const ExpSum& one : all[threadIdx.x]) total.add(one);
  if (!call.is_of_documents())
    call.sums[part * args.num_rows * args.num_query_heads + heads.index(item)] = total;
  else
    args.out[heads.index(item) * parts + part] =
        tile.list == args.layout.num_lists ? NAN : total.peak + logf(total.sum);
}

// A block for a tile of items and a KV head: adds their sums over all parts.
__global__ void add_sums(const __grid_constant__ Call call) {
  const Args& args = call.args;
  const int kv_heads = static_cast<int>(args.num_kv_heads);
  const ItemTile tile = item_tile(call, blockIdx.x / kv_heads);
  const int item = tile.begin + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kTile || item >= tile.end) return;
  const int64_t index = Heads<float>{call, static_cast<int>(blockIdx.x % kv_heads)}.index(item);
  ExpSum total = kEmpty;
  for (int part = 0; part < call.parts; ++part)
    total.add(call.sums[part * args.num_rows * args.num_query_heads + index]);
  const float num_rows = static_cast<float>(call.row_begin[tile.list + 1] - call.row_begin[tile.list]);
  call.softmaxes[index] = {total.peak, 1 / (total.sum * num_rows), total.weighted / total.sum};
}

// Keys stay. A block for a tile of them and a KV head.
template <class T>
__global__ void mass(const __grid_constant__ Call call) {
  const Args& args = call.args;
  const Heads<T> heads{call, static_cast<int>(blockIdx.x % args.num_kv_heads)};
  const int number = static_cast<int>(blockIdx.x / args.num_kv_heads);
  const KeyTile keys = key_tile(args.layout, number, segment_of_tile(args.layout, number));
  if (keys.begin >= keys.end) return;
  const Range items = lookers_of(call, keys.segment).items;
  float mine[kStaying] = {};
  for (int begin = items.begin; begin < items.end; begin += kTile) {
    float z[kMoving][kStaying];
    logits(call, heads.queries(begin, items.end), heads.keys(keys), z);
    for (int i = 0; i < kMoving; ++i) {
      const int item = begin + moving_of(i);
      if (item >= items.end) continue;
      const Row row = heads.row(item);
      const Softmax softmax = call.softmaxes[heads.index(item)];
      for (int j = 0; j < kStaying; ++j)
        if (row.sees(keys.begin + staying_of(j))) mine[j] += softmax.factor * expf(z[i][j] - softmax.peak);
    }
  }

  __shared__ float all[kTile][kTile / kMoving];
  for (int j = 0; j < kStaying; ++j) all[staying_of(j)][lane_of_8()] = mine[j];
  __syncthreads();
  const int key = keys.begin + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kTile || key >= keys.end) return;
  float total = 0;
  for (const float one : all[threadIdx.x]) total += one;
  call.partials[heads.kv_head * args.layout.num_tokens + key] = total;
}

// factor is 0 where nothing flows back.
__device__ Softmax softmax_of(const Call& call, int64_t index, int document) {
  if (!call.is_of_documents()) return call.softmaxes[index];
  if (document < 0 || document >= call.args.max_documents) return {0, 0, 0};
  const int64_t at = index * call.args.max_documents + document;
  const float lse = call.args.out[at];
  return {lse, lse == -INFINITY ? 0 : call.grad_out[at], 0};
}

// d loss / d (q . k) for a row and a key that it sees.
__device__ float slope_of(const Call& call, const Softmax& softmax, int key, float z) {
  if (softmax.factor == 0) return 0;
  float slope = call.args.scale * softmax.factor * expf(z - softmax.peak);
  if (!call.is_of_documents()) slope *= call.grad_out[key] - softmax.mean;
  const float tangent = call.args.softcap > 0 ? z / call.args.softcap : 0;
  return slope * (1 - tangent * tangent);
}

// The gradient of what stays: kColumns columns from `column` on of the sum of slopes times what moves.
struct Gradient {
  static constexpr int kChunks = kColumns / 64;
  int column;
  float sums[4][kChunks][4] = {};

  // A slope of 0 adds nothing, whatever it is multiplied with. Only after logits(), which waits for the last add().
  template <class Function>
  __device__ void add(const Call& call, const float (&slopes)[kMoving][kStaying], Function moving) {
    __shared__ Tile<kTile> slope_tile;
    __shared__ Tile<kColumns> vectors;
    for (int i = 0; i < kMoving; ++i)
      for (int j = 0; j < kStaying; ++j) slope_tile.values[moving_of(i)][staying_of(j)] = slopes[i][j];
    stage(call, moving, column, vectors);
    __syncthreads();
    for (int m = 0; m < kTile; ++m) {
      const Four slope = slope_tile.at(m, 4 * lane_of_8());
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const Four vector = vectors.at(m, 64 * chunk + 4 * lane_of_16());
        for (int i = 0; i < 4; ++i) {
          if (slope.values[i] == 0) continue;
          for (int k = 0; k < 4; ++k) sums[i][chunk][k] += slope.values[i] * vector.values[k];
        }
      }
    }
  }

  // Calls f(i, column, value) for what the thread has of the staying vectors.
  template <class Function>
  __device__ void visit(const Call& call, Function f) const {
    for (int i = 0; i < 4; ++i)
      for (int chunk = 0; chunk < kChunks; ++chunk)
        for (int k = 0; k < 4; ++k) {
          const int at = column + 64 * chunk + 4 * lane_of_16() + k;
          if (at < call.args.head_size) f(4 * lane_of_8() + i, at, sums[i][chunk][k]);
        }
  }
};

// Queries stay. A block for a tile of items, a KV head, a part of the list's keys and kColumns columns.
template <class T>
__global__ void query_gradient(const __grid_constant__ Call call) {
  const Args& args = call.args;
  const int columns = static_cast<int>(divide_up(args.head_size, kColumns));
  const int kv_heads = static_cast<int>(args.num_kv_heads);
  Gradient gradient{static_cast<int>(blockIdx.x % columns) * kColumns};
  const int part = blockIdx.x / columns % call.parts;
  const Heads<T> heads{call, static_cast<int>(blockIdx.x / columns / call.parts % kv_heads)};
  const ItemTile tile = item_tile(call, blockIdx.x / columns / call.parts / kv_heads);
  if (tile.begin >= tile.end) return;
  const Range segments = segments_of(call, tile.list);
  for_key_tiles(args.layout, part_of(tiles_of(args.layout, segments), part, call.parts), [&](KeyTile keys) {
    float z[kMoving][kStaying];
    logits(call, heads.keys(keys), heads.queries(tile.begin, tile.end), z);
    for (int j = 0; j < kStaying; ++j) {
      const int item = min(tile.begin + staying_of(j), tile.end - 1);
      const Row row = heads.row(item);
      const Softmax softmax = softmax_of(call, heads.index(item), keys.segment - segments.begin);
      for (int i = 0; i < kMoving; ++i) {
        const int key = keys.begin + moving_of(i);
        z[i][j] = key < keys.end && row.sees(key) ? slope_of(call, softmax, key, z[i][j]) : 0;
      }
    }
    gradient.add(call, z, heads.keys(keys));
  });
  gradient.visit(call, [&](int i, int column, float value) {
    if (tile.begin + i >= tile.end) return;
    const int64_t index = part * args.num_rows * args.num_query_heads + heads.index(tile.begin + i);
    call.partials[index * args.head_size + column] = value;
  });
}

// Keys stay. A block for a tile of them, a KV head and kColumns columns.
template <class T>
__global__ void key_gradient(const __grid_constant__ Call call) {
  const Args& args = call.args;
  const int columns = static_cast<int>(divide_up(args.head_size, kColumns));
  const int kv_heads = static_cast<int>(args.num_kv_heads);
  Gradient gradient{static_cast<int>(blockIdx.x % columns) * kColumns};
  const Heads<T> heads{call, static_cast<int>(blockIdx.x / columns % kv_heads)};
  const int number = blockIdx.x / columns / kv_heads;
  const KeyTile keys = key_tile(args.layout, number, segment_of_tile(args.layout, number));
  if (keys.begin >= keys.end) return;
  const Lookers lookers = lookers_of(call, keys.segment);
  for (int begin = lookers.items.begin; begin < lookers.items.end; begin += kTile) {
    const auto queries = heads.queries(begin, lookers.items.end);
    float z[kMoving][kStaying];
    logits(call, queries, heads.keys(keys), z);
    for (int i = 0; i < kMoving; ++i) {
      const bool is_there = begin + moving_of(i) < lookers.items.end;
      const int item = is_there ? begin + moving_of(i) : begin;
      const Row row = heads.row(item);
      const Softmax softmax = softmax_of(call, heads.index(item), lookers.document);
      for (int j = 0; j < kStaying; ++j) {
        const int key = keys.begin + staying_of(j);
        z[i][j] = is_there && key < keys.end && row.sees(key) ? slope_of(call, softmax, key, z[i][j]) : 0;
      }
    }
    gradient.add(call, z, queries);
  }
  gradient.visit(call, [&](int i, int column, float value) {
    const int64_t key = keys.begin + i;
    if (key < keys.end)
      static_cast<T*>(call.grad_key)[(key * kv_heads + heads.kv_head) * args.head_size + column] =
          static_cast<T>(value);
  });
}

__global__ void add_partials(const float* partials, int64_t parts, int64_t size, float* out) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partials[part * size + i];
  out[i] = sum;
}

// Divides the workspace among the arrays of the call; returns its bytes.
size_t divide(Call& call, void* workspace) {
  const Args& args = call.args;
  const int64_t states = args.num_rows * args.num_query_heads;
  size_t bytes = 0;
  const auto take = [&](auto*& array, int64_t count) {
    if (workspace)
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(workspace) + bytes);
    bytes += (static_cast<size_t>(count) * sizeof(*array) + 15) / 16 * 16;
  };
  take(call.rows, args.num_rows);
  take(call.row_begin, args.layout.num_segments + 2);
  if (!call.is_of_documents()) {
    take(call.sums, call.parts * states);
    take(call.softmaxes, states);
  }
  if (call.op == Op::kMass) take(call.partials, args.num_kv_heads * args.layout.num_tokens);
  if (call.is_backward()) take(call.partials, call.parts * states * args.head_size);
  return bytes;
}

Call call_of(Op op, const Args& args) {
  Call call{};
  call.args = args;
  call.op = op;
  call.group = static_cast<int>(args.num_query_heads / args.num_kv_heads);
  // As many as make kEnoughBlocks blocks with the tiles and KV heads.
  const int64_t tiles = divide_up(args.num_rows * call.group, kTile) * args.num_kv_heads;
  call.parts = static_cast<int>(divide_up(kEnoughBlocks, max(tiles, int64_t{1})));
  return call;
}

template <class T>
bool is_aligned(const TokenHeads& t, int64_t head_size) {
  constexpr int kSize = Vector<T>::kSize;
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.token_stride % kSize == 0 && t.head_stride % kSize == 0 &&
         head_size % kSize == 0;
}

template <class T>
int launch(Call call, float* grad_query, cudaStream_t stream) {
  const Args& args = call.args;
  call.is_aligned = is_aligned<T>(args.query, args.head_size) && is_aligned<T>(args.key, args.head_size);
  const int64_t lists = args.layout.num_lists, states = args.num_rows * args.num_query_heads;
  const int64_t item_tiles = max_tiles(args.num_rows * call.group, lists + 1) * args.num_kv_heads;
  const int64_t key_tiles = max_tiles(args.layout.num_tokens, args.layout.num_segments + 1) * args.num_kv_heads;
  const int64_t columns = divide_up(args.head_size, kColumns);
  int error = cudaSuccess;
  const auto go = [&](auto kernel, int64_t blocks, auto... arguments) {
    if (blocks > INT_MAX) error = cudaErrorInvalidValue;
    if (blocks == 0 || error != cudaSuccess) return;
    RANKERNEL_LAUNCH(kernel, static_cast<unsigned>(blocks), kBlock, stream, arguments...);
    error = cudaGetLastError();
  };
  // Items and tokens have 32-bit numbers, and row_begin has room for as many lists as the segments can make.
  if (max(args.num_rows * call.group, args.layout.num_tokens) > INT_MAX - kTile || 2 * lists > args.layout.num_segments)
    return cudaErrorInvalidValue;
  go(sort_rows, divide_up(max(args.num_rows, lists + 2), kBlock), call);
  if (call.op == Op::kLogSumExp) go(exp_sums<T>, item_tiles * args.max_documents, call);
  if (!call.is_of_documents()) {
    go(exp_sums<T>, item_tiles * call.parts, call);
    go(add_sums, item_tiles, call);
  }
  if (call.op == Op::kMass) {
    go(mass<T>, key_tiles, call);
    const int64_t tokens = args.layout.num_tokens;
    go(add_partials, divide_up(tokens, kBlock), call.partials, args.num_kv_heads, tokens, args.out);
  }
  if (call.is_backward()) {
    go(key_gradient<T>, key_tiles * columns, call);
    go(query_gradient<T>, item_tiles * call.parts * columns, call);
    const int64_t size = states * args.head_size;
    go(add_partials, divide_up(size, kBlock), call.partials, int64_t{call.parts}, size, grad_query);
  }
  return error;
}

int run(Call call, float* grad_query, void* workspace, void* stream) {
  divide(call, workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  if (call.args.dtype == DType::kFloat32) return launch<float>(call, grad_query, on);
  if (call.args.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(call, grad_query, on);
  return launch<__half>(call, grad_query, on);
}

int run_backward(Op op, const DocumentScoresBackwardArgs& args, void* workspace, void* stream) {
  Call call = call_of(op, args.forward);
  call.grad_out = args.grad_out;
  call.grad_key = args.grad_key;
  return run(call, args.grad_query, workspace, stream);
}

}  // namespace

size_t document_scores_workspace(DocumentScoresOp op, const DocumentScoresArgs& args) {
  Call call = call_of(op, args);
  return divide(call, nullptr);
}

int document_logsumexp(const DocumentScoresArgs& args, void* workspace, void* stream) {
  return run(call_of(Op::kLogSumExp, args), nullptr, workspace, stream);
}

int token_attention_mass(const DocumentScoresArgs& args, void* workspace, void* stream) {
  return run(call_of(Op::kMass, args), nullptr, workspace, stream);
}

int document_logsumexp_backward(const DocumentScoresBackwardArgs& args, void* workspace, void* stream) {
  return run_backward(Op::kLogSumExpBackward, args, workspace, stream);
}

int token_attention_mass_backward(const DocumentScoresBackwardArgs& args, void* workspace, void* stream) {
  return run_backward(Op::kMassBackward, args, workspace, stream);
}

}  // namespace rankernel::cuda
