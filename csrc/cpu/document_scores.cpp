// Cuts every list's keys into tasks of at most one score strip, computes the log-sum-exp of each row over each task,
// and combines: per document for document_logsumexp, per row for token_attention_mass, which then visits the keys
// again. Every task owns its outputs and combining runs in order, so results do not depend on the number of threads.

#include "../document_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "list_spans.h"
#include "scratch.h"

namespace rankernel {
namespace {

constexpr int64_t kMaxKeys = 512;  // the score strip of simd/tile.h
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

enum class Keys { kAll, kDocuments };

struct Piece {
  int64_t document;  // of its list; -1: none
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
    std::vector<int64_t> rows;
    while (next < order.size() && args.rows[order[next]] < list.end) rows.push_back(order[next++]);
    if (rows.empty()) continue;
    if (keys == Keys::kAll) add_segment(work, args, list, rows, -1, list.begin, list.prefix_end);
    for (int64_t d = 0; d < list.num_documents; ++d)
      add_segment(work, args, list, rows, d, list.documents[d], list.documents[d + 1]);
    if (keys == Keys::kAll) add_segment(work, args, list, rows, -1, list.tail_begin, list.end);
  }
  return Status::kOk;
}

ScoreTask task_of(const Piece& piece) {
  return {piece.rows.data(), static_cast<int64_t>(piece.rows.size()), piece.num_list_rows, piece.key_begin,
          piece.key_end};
}

void compute_pieces(const DocumentScoresArgs& args, const ScoreKernels& kernels, const Work& work, int threads,
                    const Scratch& scratch, std::vector<SoftmaxState>& states) {
  states.assign(work.num_states, {kNegativeInfinity, 0.0f});
  const int64_t heads = args.num_kv_heads, num_tasks = static_cast<int64_t>(work.pieces.size()) * heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t i = 0; i < num_tasks; ++i) {
    const Piece& piece = work.pieces[static_cast<size_t>(i / heads)];
    kernels.reduce(args, task_of(piece), i % heads, states.data() + piece.first_state, kMaxKeys, scratch.of_thread());
  }
}

// Adds b to a; a state without keys has a sum of 0. A NaN in either stays.
void add(SoftmaxState& a, const SoftmaxState& b) {
  if (b.sum == 0.0f) return;
  if (a.sum == 0.0f) {
    a = b;
    return;
  }
  const float maximum = std::max(a.maximum, b.maximum);
  a = {maximum, a.sum * std::exp2(a.maximum - maximum) + b.sum * std::exp2(b.maximum - maximum)};
}

}  // namespace

Status document_logsumexp(const DocumentScoresArgs& args, int isa) {
  Work work;
  if (const Status status = plan(args, Keys::kDocuments, work); status != Status::kOk) return status;
  const ScoreKernels kernels = select_score_kernels(args.dtype, isa);
  const int threads = std::max(args.num_threads, 1);
  std::vector<SoftmaxState> states;
  compute_pieces(args, kernels, work, threads, Scratch(kernels.scratch_bytes(args, kMaxKeys), threads), states);
  const size_t heads = static_cast<size_t>(args.num_query_heads);
  const size_t documents = static_cast<size_t>(args.max_documents);
  std::vector<SoftmaxState> totals(static_cast<size_t>(args.num_rows) * heads * documents, {kNegativeInfinity, 0.0f});
  for (const Piece& piece : work.pieces)
    for (size_t i = 0; i < piece.rows.size(); ++i)
      for (size_t head = 0; head < heads; ++head)
        add(totals[(static_cast<size_t>(piece.rows[i]) * heads + head) * documents +
                   static_cast<size_t>(piece.document)],
            states[piece.first_state + i * heads + head]);
  constexpr float kLn2 = 0.6931471805599453f;
  for (size_t i = 0; i < totals.size(); ++i) args.out[i] = totals[i].maximum * kLn2 + std::log(totals[i].sum);
  return Status::kOk;
}

Status token_attention_mass(const DocumentScoresArgs& args, int isa) {
  Work work;
  if (const Status status = plan(args, Keys::kAll, work); status != Status::kOk) return status;
  const ScoreKernels kernels = select_score_kernels(args.dtype, isa);
  const int threads = std::max(args.num_threads, 1);
  const Scratch scratch(kernels.scratch_bytes(args, kMaxKeys), threads);
  std::vector<SoftmaxState> states;
  compute_pieces(args, kernels, work, threads, scratch, states);
  const size_t heads = static_cast<size_t>(args.num_query_heads);
  std::vector<SoftmaxState> totals(static_cast<size_t>(args.num_rows) * heads, {kNegativeInfinity, 0.0f});
  for (const Piece& piece : work.pieces)
    for (size_t i = 0; i < piece.rows.size(); ++i)
      for (size_t head = 0; head < heads; ++head)
        add(totals[static_cast<size_t>(piece.rows[i]) * heads + head], states[piece.first_state + i * heads + head]);
  std::fill_n(args.out, args.layout.num_tokens, 0.0f);
  const int64_t num_pieces = static_cast<int64_t>(work.pieces.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t i = 0; i < num_pieces; ++i)
    kernels.mass(args, task_of(work.pieces[static_cast<size_t>(i)]), totals.data(), kMaxKeys, scratch.of_thread());
  return Status::kOk;
}

}  // namespace rankernel
