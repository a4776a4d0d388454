// Cuts every list's keys into tasks of at most one score strip, computes the log-sum-exp of each row over each task,
// and combines: per document for document_logsumexp, per row for token_attention_mass, which then visits the keys
// again, as backward does. Every task owns its outputs and combining runs in order, so results do not depend on the
// number of threads.

#include "../document_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "list_spans.h"
#include "scratch.h"

namespace rankernel {
namespace {

constexpr int64_t kMaxKeys = 512;  // the score strip of simd/tile.h
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
constexpr size_t kMaxPartials = size_t{1} << 22;  // floats of query gradients that wait to be added

enum class Keys { kAll, kDocuments };

struct Piece {
  int64_t document;  // of its list; 0 where the softmax is over all keys
  std::vector<int64_t> rows;
  int64_t num_list_rows;
  int64_t key_begin, key_end;
  size_t first_state;  // of its [rows, heads] softmax states
};

struct Work {
  std::vector<Piece> pieces;
  size_t num_states = 0;
};

bool is_between(int64_t x, int64_t begin, int64_t end) { return begin <= x && x < end; }

// Pieces of one segment that belongs to `list`, with the rows that see them.
void add_segment(Work& work, const DocumentScoresArgs& args, const ListSpan& list, const std::vector<int64_t>& rows,
                 int64_t document, int64_t begin, int64_t end) {
  for (int64_t key = begin; key < end; key += kMaxKeys) {
    Piece piece{document, {}, static_cast<int64_t>(rows.size()), key, std::min(key + kMaxKeys, end), work.num_states};
    for (const int64_t row : rows) {
      const int64_t position = args.rows[row];
      const bool sees_all = args.layout.causal || position >= list.tail_begin;
      if (position >= key && (sees_all || end <= list.prefix_end || is_between(position, begin, end)))
        piece.rows.push_back(row);
    }
    if (piece.rows.empty()) continue;
    work.num_states += piece.rows.size() * static_cast<size_t>(args.num_query_heads);
    work.pieces.push_back(std::move(piece));
  }
}

// The pieces, keys rising.
Status plan(const DocumentScoresArgs& args, Keys keys, Work& work) {
  std::vector<ListSpan> lists;
  if (const Status status = read_lists(args.layout, lists); status != Status::kOk) return status;
  std::vector<int64_t> order(static_cast<size_t>(args.num_rows));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int64_t r = 0; r < args.num_rows; ++r)
    if (!is_between(args.rows[r], 0, args.layout.num_tokens)) return Status::kBadRows;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return args.rows[a] < args.rows[b]; });
  size_t next = 0;
  for (const ListSpan& list : lists) {
    if (list.num_documents > args.max_documents) return Status::kBadLayout;
    std::vector<int64_t> rows;
    while (next < order.size() && args.rows[order[next]] < list.end) rows.push_back(order[next++]);
    if (rows.empty()) continue;
    const bool all = keys == Keys::kAll;
    if (all) add_segment(work, args, list, rows, 0, list.begin, list.prefix_end);
    for (int64_t d = 0; d < list.num_documents; ++d)
      add_segment(work, args, list, rows, all ? 0 : d, list.documents[d], list.documents[d + 1]);
    if (all) add_segment(work, args, list, rows, 0, list.tail_begin, list.end);
  }
  return Status::kOk;
}

ScoreTask task_of(const Piece& piece, const float* weights) {
  return {piece.rows.data(),   static_cast<int64_t>(piece.rows.size()),
          piece.num_list_rows, piece.key_begin,
          piece.key_end,       weights};
}

// Adds b to a; a state without keys has a sum of 0. A NaN in either stays.
void add(SoftmaxState& a, const SoftmaxState& b) {
  if (b.sum == 0.0f) return;
  if (a.sum == 0.0f) {
    a = b;
    return;
  }
  const float maximum = std::max(a.maximum, b.maximum);
  const float of_a = std::exp2(a.maximum - maximum), of_b = std::exp2(b.maximum - maximum);
  a = {maximum, a.sum * of_a + b.sum * of_b, a.weighted * of_a + b.weighted * of_b};
}

// Calls f(i, j) for every row and head of a piece: i counts its states, j those of [rows, heads, documents].
template <class F>
void for_states(const DocumentScoresArgs& args, const Piece& piece, int64_t documents, F f) {
  size_t i = piece.first_state;
  for (const int64_t row : piece.rows)
    for (int64_t head = 0; head < args.num_query_heads; ++head)
      f(i++, static_cast<size_t>((row * args.num_query_heads + head) * documents + piece.document));
}

// Softmax states [rows, heads, documents] over all pieces.
std::vector<SoftmaxState> softmax_states(const DocumentScoresArgs& args, const ScoreKernels& kernels, const Work& work,
                                         int64_t documents, const float* weights, const Scratch& scratch, int threads) {
  std::vector<SoftmaxState> states(work.num_states);
  const int64_t heads = args.num_kv_heads, num_tasks = static_cast<int64_t>(work.pieces.size()) * heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t i = 0; i < num_tasks; ++i) {
    const Piece& piece = work.pieces[static_cast<size_t>(i / heads)];
    kernels.reduce(args, task_of(piece, weights), i % heads, states.data() + piece.first_state, kMaxKeys,
                   scratch.of_thread());
  }
  std::vector<SoftmaxState> totals(static_cast<size_t>(args.num_rows * args.num_query_heads * documents),
                                   {kNegativeInfinity, 0.0f, 0.0f});
  for (const Piece& piece : work.pieces)
    for_states(args, piece, documents, [&](size_t i, size_t j) { add(totals[j], states[i]); });
  return totals;
}

// Gradients for query and key from those of every piece's scores. What a piece adds to the query gradients is kept
// until the pieces before it are added, for as many pieces at a time as there is room.
void differentiate(const DocumentScoresBackwardArgs& backward, const ScoreKernels& kernels, const Work& work,
                   const std::vector<ScoreGradient>& scores, const float* weights, const Scratch& scratch,
                   int threads) {
  const DocumentScoresArgs& args = backward.forward;
  const int64_t size = args.head_size, kv_heads = args.num_kv_heads, query_heads = args.num_query_heads;
  const size_t key_bytes = static_cast<size_t>(kv_heads * size) * element_size(args.dtype);
  const auto clear_keys = [&](int64_t begin, int64_t end) {
    std::fill_n(static_cast<char*>(backward.grad_key) + static_cast<size_t>(begin) * key_bytes,
                static_cast<size_t>(end - begin) * key_bytes, char{0});
  };
  const auto partial_size = [&](const Piece& piece) {
    return piece.rows.size() * static_cast<size_t>(query_heads * size);
  };
  int64_t seen = 0;
  size_t largest = 0;
  for (const Piece& piece : work.pieces) {
    clear_keys(seen, piece.key_begin);
    seen = piece.key_end;
    largest = std::max(largest, partial_size(piece));
  }
  clear_keys(seen, args.layout.num_tokens);
  std::fill_n(backward.grad_query, args.num_rows * query_heads * size, 0.0f);
  const size_t room = std::max(largest, std::min(kMaxPartials, work.num_states * static_cast<size_t>(size)));
  const std::unique_ptr<float[]> partials(new float[room]);
  for (auto first = work.pieces.begin(); first != work.pieces.end();) {
    auto last = first;
    for (size_t used = 0; last != work.pieces.end() && used + partial_size(*last) <= room; ++last)
      used += partial_size(*last);
    const auto partial = [&](size_t state) {
      return partials.get() + (state - first->first_state) * static_cast<size_t>(size);
    };
    const int64_t num_tasks = (last - first) * kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_tasks; ++i) {
        const Piece& piece = first[i / kv_heads];
        kernels.backward(args, task_of(piece, weights), i % kv_heads, scores.data() + piece.first_state,
                         partial(piece.first_state), backward.grad_key, kMaxKeys, scratch.of_thread());
      }
#pragma omp for
      for (int64_t head = 0; head < query_heads; ++head)
        for (auto piece = first; piece != last; ++piece)
          for (size_t r = 0; r < piece->rows.size(); ++r) {
            const size_t state = piece->first_state + r * static_cast<size_t>(query_heads) + static_cast<size_t>(head);
            if (scores[state].factor == 0.0f) continue;  // took no part
            float* const sum = backward.grad_query + (piece->rows[r] * query_heads + head) * size;
            for (int64_t d = 0; d < size; ++d) sum[d] += partial(state)[d];
          }
    }
    first = last;
  }
}

}  // namespace

Status document_logsumexp(const DocumentScoresArgs& args, int isa) {
  Work work;
  if (const Status status = plan(args, Keys::kDocuments, work); status != Status::kOk) return status;
  const ScoreKernels kernels = select_score_kernels(args.dtype, isa);
  const int threads = std::max(args.num_threads, 1);
  const Scratch scratch(kernels.scratch_bytes(args, kMaxKeys, false), threads);
  const std::vector<SoftmaxState> totals =
      softmax_states(args, kernels, work, args.max_documents, nullptr, scratch, threads);
  constexpr float kLn2 = 0.6931471805599453f;
  for (size_t i = 0; i < totals.size(); ++i) args.out[i] = totals[i].maximum * kLn2 + std::log(totals[i].sum);
  return Status::kOk;
}

Status document_logsumexp_backward(const DocumentScoresBackwardArgs& backward, int isa) {
  const DocumentScoresArgs& args = backward.forward;
  Work work;
  if (const Status status = plan(args, Keys::kDocuments, work); status != Status::kOk) return status;
  const ScoreKernels kernels = select_score_kernels(args.dtype, isa);
  const int threads = std::max(args.num_threads, 1);
  const Scratch scratch(kernels.scratch_bytes(args, kMaxKeys, true), threads);
  std::vector<ScoreGradient> scores(work.num_states);
  for (const Piece& piece : work.pieces)
    for_states(args, piece, args.max_documents, [&](size_t i, size_t j) {
      if (args.out[j] == kNegativeInfinity || backward.grad_out[j] == 0.0f) return;
      // What float32 cannot hold of the log-sum-exp in units of log2 goes into the factor.
      constexpr double kLog2E = 1.4426950408889634;
      const double lse = args.out[j] * kLog2E;
      const float maximum = static_cast<float>(lse);
      const double rest = std::exp2(static_cast<double>(maximum) - lse);
      scores[i] = {maximum, backward.grad_out[j] * args.scale * static_cast<float>(rest), 0.0f};
    });
  differentiate(backward, kernels, work, scores, nullptr, scratch, threads);
  return Status::kOk;
}

Status token_attention_mass(const DocumentScoresArgs& args, int isa) {
  Work work;
  if (const Status status = plan(args, Keys::kAll, work); status != Status::kOk) return status;
  const ScoreKernels kernels = select_score_kernels(args.dtype, isa);
  const int threads = std::max(args.num_threads, 1);
  const Scratch scratch(kernels.scratch_bytes(args, kMaxKeys, false), threads);
  const std::vector<SoftmaxState> totals = softmax_states(args, kernels, work, 1, nullptr, scratch, threads);
  std::fill_n(args.out, args.layout.num_tokens, 0.0f);
  const int64_t num_pieces = static_cast<int64_t>(work.pieces.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t i = 0; i < num_pieces; ++i)
    kernels.mass(args, task_of(work.pieces[static_cast<size_t>(i)], nullptr), totals.data(), kMaxKeys,
                 scratch.of_thread());
  return Status::kOk;
}

Status token_attention_mass_backward(const DocumentScoresBackwardArgs& backward, int isa) {
  const DocumentScoresArgs& args = backward.forward;
  Work work;
  if (const Status status = plan(args, Keys::kAll, work); status != Status::kOk) return status;
  const ScoreKernels kernels = select_score_kernels(args.dtype, isa);
  const int threads = std::max(args.num_threads, 1);
  const Scratch scratch(kernels.scratch_bytes(args, kMaxKeys, true), threads);
  const std::vector<SoftmaxState> totals = softmax_states(args, kernels, work, 1, backward.grad_out, scratch, threads);
  std::vector<ScoreGradient> scores(work.num_states);
  for (const Piece& piece : work.pieces)
    for_states(args, piece, 1, [&](size_t i, size_t j) {
      const float denominator = totals[j].sum * static_cast<float>(piece.num_list_rows);
      scores[i] = {totals[j].maximum, args.scale / denominator, totals[j].weighted / totals[j].sum};
    });
  differentiate(backward, kernels, work, scores, backward.grad_out, scratch, threads);
  return Status::kOk;
}

}  // namespace rankernel
