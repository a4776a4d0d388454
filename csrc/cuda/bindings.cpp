// The Python extension rankernel._C_cuda: device addresses, sizes and a stream in, a cudaError_t out. Checks nothing
// (python/rankernel/ops does), releases the GIL, calls one function.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "cuda/candidate_logits.h"
#include "cuda/listwise_loss.h"

namespace py = pybind11;
using namespace rankernel;

namespace {

using Addresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;  // scores, labels, where, offsets

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

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

using Strided = std::pair<uintptr_t, int64_t>;

int bound_candidate_logits(int dtype, Strided hidden, Strided weight, Strided candidates, uintptr_t bias,
                           const std::array<int64_t, 4>& sizes, float scale, float softcap, uintptr_t out,
                           uintptr_t lse, uintptr_t workspace, uintptr_t stream) {
  const CandidateLogitsArgs args{static_cast<DType>(dtype),
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
                                 0};
  const py::gil_scoped_release release;
  return cuda::candidate_logits(args, pointer<void>(workspace), pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "CUDA kernels of rankernel: listwise_loss, candidate_logits.";

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
}
