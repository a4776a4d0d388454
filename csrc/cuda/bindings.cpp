// The Python extension rankernel._C_cuda: device addresses, sizes and a stream in, a cudaError_t out. Checks nothing
// (python/rankernel/ops does), releases the GIL, calls one function.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda/candidate_logits.h"
#include "cuda/document_scores.h"
#include "cuda/listwise_loss.h"
#include "cuda/lora_linear.h"

namespace py = pybind11;
using namespace rankernel;

namespace {

using Addresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;  // scores, labels, where, offsets

// In the order of python/rankernel/listwise.py.
ListwiseSettings settings_of(const std::array<double, 10>& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]};
}

size_t bound_workspace(std::pair<int64_t, int64_t> sizes, int kind, const std::array<double, 10>& settings) {
  ListwiseArgs args{};
  args.num_items = sizes.first;
  args.num_lists = sizes.second;
  args.kind = static_cast<ListwiseKind>(kind);
  args.settings = settings_of(settings);
  return cuda::listwise_loss_workspace(args);
}

int bound_listwise_loss(int dtype, const Addresses& inputs, std::pair<int64_t, int64_t> sizes,
                        std::pair<int, int> kind_and_reduction, const std::array<double, 10>& settings, uint64_t seed,
                        std::pair<uintptr_t, uintptr_t> outputs, uintptr_t workspace, uintptr_t stream) {
  const ListwiseArgs args{static_cast<DType>(dtype),
                          pointer<const void>(std::get<0>(inputs)),
                          pointer<const float>(std::get<1>(inputs)),
                          pointer<const uint8_t>(std::get<2>(inputs)),
                          pointer<const int64_t>(std::get<3>(inputs)),
                          sizes.first,
                          sizes.second,
                          static_cast<ListwiseKind>(kind_and_reduction.first),
                          static_cast<ListwiseReduction>(kind_and_reduction.second),
                          settings_of(settings),
                          seed,
                          pointer<float>(outputs.first),
                          pointer<float>(outputs.second),
                          0};
  const py::gil_scoped_release release;
  return cuda::listwise_loss(args, pointer<void>(workspace), pointer<void>(stream));
}

int bound_candidate_logits(int dtype, const Rows& hidden, const Rows& weight, const Rows& candidates, uintptr_t bias,
                           const std::array<int64_t, 4>& sizes, float scale, float softcap, uintptr_t out,
                           uintptr_t lse, uintptr_t workspace, uintptr_t stream) {
  const CandidateLogitsArgs args =
      candidate_logits_args(dtype, hidden, weight, candidates, bias, sizes, scale, softcap, out, lse, 0);
  const py::gil_scoped_release release;
  return cuda::candidate_logits(args, pointer<void>(workspace), pointer<void>(stream));
}

size_t bound_document_scores_workspace(const std::string& name, int64_t num_rows, int64_t num_tokens,
                                       int64_t num_segments, int64_t max_documents, const Heads& heads) {
  constexpr const char* kNames[] = {"document_logsumexp", "token_attention_mass", "document_logsumexp_backward",
                                    "token_attention_mass_backward"};
  const LayoutTuple layout{0, 0, num_segments, 0, false};
  const DocumentScoresArgs args =
      document_scores_args(0, {}, {}, 0, num_rows, 0, max_documents, layout, num_tokens, heads, 0, 0, 0);
  for (int op = 0; op < 4; ++op)
    if (name == kNames[op]) return cuda::document_scores_workspace(static_cast<cuda::DocumentScoresOp>(op), args);
  throw py::value_error("unknown op " + name);
}

template <int (*kOp)(const DocumentScoresArgs&, void*, void*)>
int bound_document_scores(int dtype, const Tensor& query, const Tensor& key, uintptr_t rows, int64_t num_rows,
                          uintptr_t out, int64_t max_documents, const LayoutTuple& layout, int64_t num_tokens,
                          const Heads& heads, float scale, float softcap, uintptr_t workspace, uintptr_t stream) {
  const DocumentScoresArgs args = document_scores_args(dtype, query, key, rows, num_rows, out, max_documents, layout,
                                                       num_tokens, heads, scale, softcap, 0);
  const py::gil_scoped_release release;
  return kOp(args, pointer<void>(workspace), pointer<void>(stream));
}

template <int (*kOp)(const DocumentScoresBackwardArgs&, void*, void*)>
int bound_document_scores_backward(int dtype, const Tensor& query, const Tensor& key, uintptr_t rows, int64_t num_rows,
                                   uintptr_t out, int64_t max_documents, const LayoutTuple& layout, int64_t num_tokens,
                                   const Heads& heads, float scale, float softcap, uintptr_t grad_out,
                                   uintptr_t grad_query, uintptr_t grad_key, uintptr_t workspace, uintptr_t stream) {
  const DocumentScoresBackwardArgs args{document_scores_args(dtype, query, key, rows, num_rows, out, max_documents,
                                                             layout, num_tokens, heads, scale, softcap, 0),
                                        pointer<const float>(grad_out), pointer<float>(grad_query),
                                        pointer<void>(grad_key)};
  const py::gil_scoped_release release;
  return kOp(args, pointer<void>(workspace), pointer<void>(stream));
}

int bound_lora_shrink(int dtype, int factor_dtype, const Rows& x, const std::array<int64_t, 3>& sizes,
                      const std::vector<Factor>& described, const Rows& sums, const Rows& coefficients,
                      const Segments& segments, const Dropout& dropout, uintptr_t stream) {
  const std::vector<LoraFactor> factors = factors_of(described);
  const LoraShrinkArgs args =
      lora_shrink_args(dtype, factor_dtype, x, sizes, factors, sums, coefficients, segments, {dropout.first, 0}, 0);
  const py::gil_scoped_release release;
  return cuda::lora_shrink(args, pointer<const int64_t>(dropout.second), pointer<void>(stream));
}

int bound_lora_expand(int dtype, int factor_dtype, const Rows& out, const std::array<int64_t, 2>& sizes,
                      const std::vector<Factor>& described, const Rows& coefficients, const Segments& segments,
                      const Dropout& dropout, uintptr_t stream) {
  const std::vector<LoraFactor> factors = factors_of(described);
  const LoraExpandArgs args =
      lora_expand_args(dtype, factor_dtype, out, sizes, factors, coefficients, segments, {dropout.first, 0}, 0);
  const py::gil_scoped_release release;
  return cuda::lora_expand(args, pointer<const int64_t>(dropout.second), pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() =
      "CUDA kernels of rankernel: listwise_loss, candidate_logits, document_logsumexp, token_attention_mass, "
      "lora_linear.";

  module.def("covered_kinds", [] {
    std::vector<int> kinds;
    for (int kind = 0; kind <= static_cast<int>(ListwiseKind::kGroCo); ++kind)
      if (cuda::covers(static_cast<ListwiseKind>(kind))) kinds.push_back(kind);
    return kinds;
  });
  module.def("listwise_loss_workspace", bound_workspace);
  module.def("listwise_loss", bound_listwise_loss);
  module.def("candidate_logits_workspace", cuda::candidate_logits_workspace);
  module.def("candidate_logits", bound_candidate_logits);
  module.def("document_scores_workspace", bound_document_scores_workspace);
  module.def("document_logsumexp", bound_document_scores<cuda::document_logsumexp>);
  module.def("document_logsumexp_backward", bound_document_scores_backward<cuda::document_logsumexp_backward>);
  module.def("token_attention_mass", bound_document_scores<cuda::token_attention_mass>);
  module.def("token_attention_mass_backward", bound_document_scores_backward<cuda::token_attention_mass_backward>);
  module.def("lora_shrink", bound_lora_shrink);
  module.def("lora_expand", bound_lora_expand);
}
