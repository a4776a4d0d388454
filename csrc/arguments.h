// The arguments of ops as Python hands them to either extension: addresses, strides and sizes.
#pragma once

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "candidate_logits.h"
#include "document_scores.h"
#include "lora_linear.h"

namespace rankernel {

using Rows = std::pair<uintptr_t, int64_t>;  // address, stride

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline CandidateLogitsArgs candidate_logits_args(int dtype, const Rows& hidden, const Rows& weight,
                                                 const Rows& candidates, uintptr_t bias,
                                                 const std::array<int64_t, 4>& sizes, float scale, float softcap,
                                                 uintptr_t out, uintptr_t lse, int num_threads) {
  return {static_cast<DType>(dtype),
          pointer<const void>(hidden.first),
          hidden.second,
          pointer<const void>(weight.first),
          weight.second,
          pointer<const int64_t>(candidates.first),
          candidates.second,
          pointer<const void>(bias),
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          scale,
          softcap,
          pointer<float>(out),
          pointer<float>(lse),
          num_threads};
}

using Tensor = std::tuple<uintptr_t, int64_t, int64_t>;  // address, token stride, head stride
using LayoutTuple =
    std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, bool>;  // cu_seqlens, list_offsets, sizes, causal
using Heads = std::tuple<int64_t, int64_t, int64_t>;           // query heads, KV heads, head size

inline TokenHeads token_heads(const Tensor& t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

inline Layout layout_of(const LayoutTuple& t, int64_t num_tokens) {
  return {pointer<const int32_t>(std::get<0>(t)),
          pointer<const int32_t>(std::get<1>(t)),
          std::get<2>(t),
          std::get<3>(t),
          num_tokens,
          std::get<4>(t)};
}

inline DocumentScoresArgs document_scores_args(int dtype, const Tensor& query, const Tensor& key, uintptr_t rows,
                                               int64_t num_rows, uintptr_t out, int64_t max_documents,
                                               const LayoutTuple& layout, int64_t num_tokens, const Heads& heads,
                                               float scale, float softcap, int num_threads) {
  return {static_cast<DType>(dtype),
          token_heads(query),
          token_heads(key),
          pointer<const int64_t>(rows),
          num_rows,
          pointer<float>(out),
          max_documents,
          layout_of(layout, num_tokens),
          std::get<0>(heads),
          std::get<1>(heads),
          std::get<2>(heads),
          scale,
          softcap,
          num_threads};
}

// Address, rank, strides of ranks and columns; column, scale; address and strides of the gradient.
using Factor = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, float, uintptr_t, int64_t, int64_t>;
using Segments = std::tuple<uintptr_t, uintptr_t, int64_t>;  // addresses of offsets (0: none) and adapters, count
using Dropout = std::pair<uint32_t, uint64_t>;               // threshold, seed or its address

inline std::vector<LoraFactor> factors_of(const std::vector<Factor>& described) {
  std::vector<LoraFactor> factors;
  for (const auto& [data, rank, rank_stride, size_stride, column, scale, gradient, gradient_rank, gradient_size] :
       described)
    factors.push_back({pointer<const void>(data), rank, rank_stride, size_stride, column, scale,
                       pointer<void>(gradient), gradient_rank, gradient_size});
  return factors;
}

inline LoraSegments segments_of(const Segments& t) {
  return {pointer<const int64_t>(std::get<0>(t)), pointer<const int64_t>(std::get<1>(t)), std::get<2>(t)};
}

// `factors` outlives the result.
inline LoraShrinkArgs lora_shrink_args(int dtype, int factor_dtype, const Rows& x, const std::array<int64_t, 3>& sizes,
                                       const std::vector<LoraFactor>& factors, const Rows& sums,
                                       const Rows& coefficients, const Segments& segments, const Dropout& dropout,
                                       int num_threads) {
  return {static_cast<DType>(dtype),
          static_cast<DType>(factor_dtype),
          pointer<const void>(x.first),
          x.second,
          sizes[0],
          sizes[1],
          factors.data(),
          static_cast<int64_t>(factors.size()),
          sizes[2],
          pointer<float>(sums.first),
          sums.second,
          pointer<const float>(coefficients.first),
          coefficients.second,
          segments_of(segments),
          {dropout.first, dropout.second},
          num_threads};
}

inline LoraExpandArgs lora_expand_args(int dtype, int factor_dtype, const Rows& out,
                                       const std::array<int64_t, 2>& sizes, const std::vector<LoraFactor>& factors,
                                       const Rows& coefficients, const Segments& segments, const Dropout& dropout,
                                       int num_threads) {
  return {static_cast<DType>(dtype),
          static_cast<DType>(factor_dtype),
          pointer<void>(out.first),
          out.second,
          sizes[0],
          sizes[1],
          factors.data(),
          static_cast<int64_t>(factors.size()),
          pointer<const float>(coefficients.first),
          coefficients.second,
          segments_of(segments),
          {dropout.first, dropout.second},
          num_threads};
}

}  // namespace rankernel
