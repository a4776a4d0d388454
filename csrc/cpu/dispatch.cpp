#include "dispatch.h"

namespace rankernel {
namespace {

#ifdef RANKERNEL_AMX_EMULATED
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

constexpr int kAttention = 0, kScores = 1, kListwise = 2, kFeedback = 3, kCandidates = 4, kLora = 5;

}  // namespace

// dtypes in the order of DType: float32, bfloat16, float16.
extern const KernelTable kKernelTables[] = {
    {"block_attention",
     {/* scalar       */ {true, true, true},
      /* avx2         */ {true, true, true},
      /* avx512       */ {true, true, true},
      /* avx512bf16   */ {false, true, false},
      /* amx          */ {false, true, false},
      /* amx_emulated */ {false, kEmulated, false}}},
    {"document_scores",
     {/* scalar       */ {true, true, true},
      /* avx2         */ {true, true, true},
      /* avx512       */ {true, true, true},
      /* avx512bf16   */ {false, false, false},
      /* amx          */ {false, false, false},
      /* amx_emulated */ {false, false, false}}},
    {"listwise_loss",
     {/* scalar       */ {true, true, true},
      /* avx2         */ {true, true, true},
      /* avx512       */ {true, true, true},
      /* avx512bf16   */ {false, false, false},
      /* amx          */ {false, false, false},
      /* amx_emulated */ {false, false, false}}},
    {"relevance_feedback",
     {/* scalar       */ {true, true, true},
      /* avx2         */ {true, true, true},
      /* avx512       */ {true, true, true},
      /* avx512bf16   */ {false, false, false},
      /* amx          */ {false, false, false},
      /* amx_emulated */ {false, false, false}}},
    {"candidate_logits",
     {/* scalar       */ {true, true, true},
      /* avx2         */ {true, true, true},
      /* avx512       */ {true, true, true},
      /* avx512bf16   */ {false, true, false},
      /* amx          */ {false, true, false},
      /* amx_emulated */ {false, kEmulated, false}}},
    {"lora_linear",
     {/* scalar       */ {true, true, true},
      /* avx2         */ {true, true, true},
      /* avx512       */ {true, true, true},
      /* avx512bf16   */ {false, true, false},
      /* amx          */ {false, true, false},
      /* amx_emulated */ {false, kEmulated, false}}},
};
extern const int kNumKernelTables = sizeof(kKernelTables) / sizeof(kKernelTables[0]);

int select_isa(const KernelTable& table, DType dtype, int isa) {
  while (!table.has[isa][static_cast<int>(dtype)]) --isa;
  return isa;
}

AttentionKernels select_attention_kernels(DType dtype, int isa) {
  switch (select_isa(kKernelTables[kAttention], dtype, isa)) {
#ifdef RANKERNEL_AMX_EMULATED
    case kAmxEmulated:
      return amx_emulated::attention_kernels(dtype);
#endif
    case kAmx:
      return amx::attention_kernels(dtype);
    case kAvx512Bf16:
      return avx512bf16::attention_kernels(dtype);
    case kAvx512:
      return avx512::attention_kernels(dtype);
    case kAvx2:
      return avx2::attention_kernels(dtype);
    default:
      return scalar::attention_kernels(dtype);
  }
}

ScoreKernels select_score_kernels(DType dtype, int isa) {
  switch (select_isa(kKernelTables[kScores], dtype, isa)) {
    case kAvx512:
      return avx512::score_kernels(dtype);
    case kAvx2:
      return avx2::score_kernels(dtype);
    default:
      return scalar::score_kernels(dtype);
  }
}

ListwiseKernels select_listwise_kernels(DType dtype, int isa) {
  switch (select_isa(kKernelTables[kListwise], dtype, isa)) {
    case kAvx512:
      return avx512::listwise_kernels();
    case kAvx2:
      return avx2::listwise_kernels();
    default:
      return scalar::listwise_kernels();
  }
}

FeedbackKernels select_feedback_kernels(DType dtype, int isa) {
  switch (select_isa(kKernelTables[kFeedback], dtype, isa)) {
    case kAvx512:
      return avx512::feedback_kernels(dtype);
    case kAvx2:
      return avx2::feedback_kernels(dtype);
    default:
      return scalar::feedback_kernels(dtype);
  }
}

CandidateKernels select_candidate_kernels(DType dtype, int isa) {
  switch (select_isa(kKernelTables[kCandidates], dtype, isa)) {
#ifdef RANKERNEL_AMX_EMULATED
    case kAmxEmulated:
      return amx_emulated::candidate_kernels(dtype);
#endif
    case kAmx:
      return amx::candidate_kernels(dtype);
    case kAvx512Bf16:
      return avx512bf16::candidate_kernels(dtype);
    case kAvx512:
      return avx512::candidate_kernels(dtype);
    case kAvx2:
      return avx2::candidate_kernels(dtype);
    default:
      return scalar::candidate_kernels(dtype);
  }
}

LoraKernels select_lora_kernels(DType dtype, DType factor_dtype, int isa) {
  switch (select_isa(kKernelTables[kLora], dtype, isa)) {
#ifdef RANKERNEL_AMX_EMULATED
    case kAmxEmulated:
      return amx_emulated::lora_kernels(dtype, factor_dtype);
#endif
    case kAmx:
      return amx::lora_kernels(dtype, factor_dtype);
    case kAvx512Bf16:
      return avx512bf16::lora_kernels(dtype, factor_dtype);
    case kAvx512:
      return avx512::lora_kernels(dtype, factor_dtype);
    case kAvx2:
      return avx2::lora_kernels(dtype, factor_dtype);
    default:
      return scalar::lora_kernels(dtype, factor_dtype);
  }
}

}  // namespace rankernel
