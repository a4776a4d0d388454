// The Python extension rankernel._C_cuda: device addresses, sizes and a stream in, a cudaError_t out. Checks nothing
// (python/rankernel/ops does), releases the GIL, calls one function.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda/candidate_logits.h"
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
  module.doc() = "CUDA kernels of rankernel: listwise_loss, candidate_logits, lora_linear.";

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
  module.def("lora_shrink", bound_lora_shrink);
  module.def("lora_expand", bound_lora_expand);
}
