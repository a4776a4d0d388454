// The Python extension rankernel._C: pointers and sizes in, a status out. Checks nothing (python/rankernel/ops does),
// releases the GIL, calls one function.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "block_attention.h"
#include "cpu/cpu_features.h"
#include "cpu/dispatch.h"
#include "listwise_loss.h"
#include "relevance_feedback.h"

namespace py = pybind11;
using namespace rankernel;

namespace {

#ifdef RANKERNEL_AMX_EMULATED
constexpr int kBuiltIsas = kNumIsas;
#else
constexpr int kBuiltIsas = kAmxEmulated;
#endif

const KernelTable& table_of(const std::string& op) {
  for (int i = 0; i < kNumKernelTables; ++i)
    if (op == kKernelTables[i].op) return kKernelTables[i];
  throw py::value_error("unknown op " + op);
}

BlockAttentionArgs block_attention_args(int dtype, const Tensor& query, const Tensor& key, const Tensor& value,
                                        const Tensor& out, uintptr_t lse, uintptr_t sinks, const LayoutTuple& layout,
                                        int64_t num_tokens, const Heads& heads, float scale, float softcap,
                                        int64_t window, int num_threads) {
  return {static_cast<DType>(dtype),
          token_heads(query),
          token_heads(key),
          token_heads(value),
          token_heads(out),
          pointer<float>(lse),
          pointer<const float>(sinks),
          layout_of(layout, num_tokens),
          std::get<0>(heads),
          std::get<1>(heads),
          std::get<2>(heads),
          scale,
          softcap,
          window,
          num_threads};
}

int bound_block_attention(int isa, int dtype, const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& out, uintptr_t lse, uintptr_t sinks, const LayoutTuple& layout,
                          int64_t num_tokens, const Heads& heads, float scale, float softcap, int64_t window,
                          int num_threads) {
  const BlockAttentionArgs args = block_attention_args(dtype, query, key, value, out, lse, sinks, layout, num_tokens,
                                                       heads, scale, softcap, window, num_threads);
  const py::gil_scoped_release release;
  return static_cast<int>(block_attention(args, isa));
}

int bound_block_attention_backward(const Tensor& grad_out, uintptr_t grad_lse, const Tensor& grad_query,
                                   const Tensor& grad_key, const Tensor& grad_value, uintptr_t grad_sinks, int isa,
                                   int dtype, const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Tensor& out, uintptr_t lse, uintptr_t sinks, const LayoutTuple& layout,
                                   int64_t num_tokens, const Heads& heads, float scale, float softcap, int64_t window,
                                   int num_threads) {
  const BlockAttentionBackwardArgs args{block_attention_args(dtype, query, key, value, out, lse, sinks, layout,
                                                             num_tokens, heads, scale, softcap, window, num_threads),
                                        token_heads(grad_out),
                                        pointer<const float>(grad_lse),
                                        token_heads(grad_query),
                                        token_heads(grad_key),
                                        token_heads(grad_value),
                                        pointer<float>(grad_sinks)};
  const py::gil_scoped_release release;
  return static_cast<int>(block_attention_backward(args, isa));
}

template <Status (*kOp)(const DocumentScoresArgs&, int)>
int bound_document_scores(int isa, int dtype, const Tensor& query, const Tensor& key, uintptr_t rows, int64_t num_rows,
                          uintptr_t out, int64_t max_documents, const LayoutTuple& layout, int64_t num_tokens,
                          const Heads& heads, float scale, float softcap, int num_threads) {
  const DocumentScoresArgs args = document_scores_args(dtype, query, key, rows, num_rows, out, max_documents, layout,
                                                       num_tokens, heads, scale, softcap, num_threads);
  const py::gil_scoped_release release;
  return static_cast<int>(kOp(args, isa));
}

template <Status (*kOp)(const DocumentScoresBackwardArgs&, int)>
int bound_document_scores_backward(int isa, int dtype, const Tensor& query, const Tensor& key, uintptr_t rows,
                                   int64_t num_rows, uintptr_t out, int64_t max_documents, const LayoutTuple& layout,
                                   int64_t num_tokens, const Heads& heads, float scale, float softcap, int num_threads,
                                   uintptr_t grad_out, uintptr_t grad_query, uintptr_t grad_key) {
  const DocumentScoresBackwardArgs args{document_scores_args(dtype, query, key, rows, num_rows, out, max_documents,
                                                             layout, num_tokens, heads, scale, softcap, num_threads),
                                        pointer<const float>(grad_out), pointer<float>(grad_query),
                                        pointer<void>(grad_key)};
  const py::gil_scoped_release release;
  return static_cast<int>(kOp(args, isa));
}

int bound_listwise_loss(int isa, int dtype, const std::array<uintptr_t, 4>& inputs, const std::array<int64_t, 2>& sizes,
                        const std::array<int, 2>& kind_and_reduction, const std::array<double, 10>& settings,
                        uint64_t seed, const std::array<uintptr_t, 2>& outputs, int num_threads) {
  const ListwiseArgs args{static_cast<DType>(dtype),
                          pointer<const void>(inputs[0]),
                          pointer<const float>(inputs[1]),
                          pointer<const uint8_t>(inputs[2]),
                          pointer<const int64_t>(inputs[3]),
                          sizes[0],
                          sizes[1],
                          static_cast<ListwiseKind>(kind_and_reduction[0]),
                          static_cast<ListwiseReduction>(kind_and_reduction[1]),
                          {settings[0], settings[1], settings[2], settings[3], settings[4], settings[5], settings[6],
                           settings[7], settings[8], settings[9]},
                          seed,
                          pointer<float>(outputs[0]),
                          pointer<float>(outputs[1]),
                          num_threads};
  const py::gil_scoped_release release;
  return static_cast<int>(listwise_loss(args, isa));
}

void bound_relevance_feedback(int isa, int dtype, uintptr_t queries, const Tensor& documents, uintptr_t teacher,
                              uintptr_t where, const std::array<int64_t, 3>& sizes, int loss, double learning_rate,
                              int64_t num_steps, float scale, int num_threads) {
  const RelevanceFeedbackArgs args{static_cast<DType>(dtype),
                                   pointer<float>(queries),
                                   pointer<const void>(std::get<0>(documents)),
                                   std::get<1>(documents),
                                   std::get<2>(documents),
                                   pointer<const float>(teacher),
                                   pointer<const uint8_t>(where),
                                   sizes[0],
                                   sizes[1],
                                   sizes[2],
                                   static_cast<FeedbackLoss>(loss),
                                   learning_rate,
                                   num_steps,
                                   scale,
                                   num_threads};
  const py::gil_scoped_release release;
  relevance_feedback(args, isa);
}

int bound_candidate_logits(int isa, int dtype, const Rows& hidden, const Rows& weight, const Rows& candidates,
                           uintptr_t bias, const std::array<int64_t, 4>& sizes, float scale, float softcap,
                           uintptr_t out, uintptr_t lse, int num_threads) {
  const CandidateLogitsArgs args =
      candidate_logits_args(dtype, hidden, weight, candidates, bias, sizes, scale, softcap, out, lse, num_threads);
  const py::gil_scoped_release release;
  return static_cast<int>(candidate_logits(args, isa));
}

int bound_lora_shrink(int isa, int dtype, int factor_dtype, const Rows& x, const std::array<int64_t, 3>& sizes,
                      const std::vector<Factor>& described, const Rows& sums, const Rows& coefficients,
                      const Segments& segments, const Dropout& dropout, int num_threads) {
  const std::vector<LoraFactor> factors = factors_of(described);
  const LoraShrinkArgs args =
      lora_shrink_args(dtype, factor_dtype, x, sizes, factors, sums, coefficients, segments, dropout, num_threads);
  const py::gil_scoped_release release;
  return static_cast<int>(lora_shrink(args, isa));
}

int bound_lora_expand(int isa, int dtype, int factor_dtype, const Rows& out, const std::array<int64_t, 2>& sizes,
                      const std::vector<Factor>& described, const Rows& coefficients, const Segments& segments,
                      const Dropout& dropout, int num_threads) {
  const std::vector<LoraFactor> factors = factors_of(described);
  const LoraExpandArgs args =
      lora_expand_args(dtype, factor_dtype, out, sizes, factors, coefficients, segments, dropout, num_threads);
  const py::gil_scoped_release release;
  return static_cast<int>(lora_expand(args, isa));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "CPU kernels of rankernel: block_attention, candidate_logits, document_logsumexp, token_attention_mass, "
      "listwise_loss, lora_shrink, lora_expand, relevance_feedback.";

  module.def("isas", [] {
    std::vector<std::string> names;
    for (int isa = 0; isa < kBuiltIsas; ++isa) names.emplace_back(isa_name(isa));
    return names;
  });
  module.def("missing_features", [] {
    std::map<std::string, std::string> missing;
    for (int isa = 0; isa < kBuiltIsas; ++isa) {
      const char* feature = missing_feature(isa);
      missing[isa_name(isa)] = feature ? feature : "";
    }
    return missing;
  });
  module.def("kernels", [](const std::string& op) {
    constexpr const char* kDTypes[3] = {"float32", "bfloat16", "float16"};
    std::vector<std::pair<std::string, std::vector<std::string>>> kernels;
    for (int isa = 0; isa < kBuiltIsas; ++isa) {
      std::vector<std::string> dtypes;
      for (int dtype = 0; dtype < 3; ++dtype)
        if (table_of(op).has[isa][dtype]) dtypes.emplace_back(kDTypes[dtype]);
      if (!dtypes.empty()) kernels.emplace_back(isa_name(isa), dtypes);
    }
    return kernels;
  });
  module.def("selected_isa", [](const std::string& op, int dtype, int isa) {
    return std::string(isa_name(select_isa(table_of(op), static_cast<DType>(dtype), isa)));
  });

  module.def("block_attention", bound_block_attention);
  module.def("block_attention_backward", bound_block_attention_backward);
  module.def("document_logsumexp", bound_document_scores<document_logsumexp>);
  module.def("document_logsumexp_backward", bound_document_scores_backward<document_logsumexp_backward>);
  module.def("token_attention_mass", bound_document_scores<token_attention_mass>);
  module.def("token_attention_mass_backward", bound_document_scores_backward<token_attention_mass_backward>);
  module.def("listwise_loss", bound_listwise_loss);
  module.def("relevance_feedback", bound_relevance_feedback);
  module.def("candidate_logits", bound_candidate_logits);
  module.def("lora_shrink", bound_lora_shrink);
  module.def("lora_expand", bound_lora_expand);
}
