#include "cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace rankernel {
namespace {

struct Registers {
  unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{0, 0, 0, 0};
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// XCR0 component masks: 1|2 = SSE and YMM, 5..7 = opmask and ZMM, 17|18 = tile configuration and data.
constexpr unsigned long long kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;

unsigned long long enabled_state() {
  if (!bit(cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool system_saves(unsigned long long mask) { return (enabled_state() & mask) == mask; }

// Linux grants the 8 KiB of tile registers per process, on request.
bool amx_permitted() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

const char* missing_avx2() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  if (!bit(seven.ebx, 5)) return "avx2";
  if (!bit(one.ecx, 12)) return "fma";
  if (!bit(one.ecx, 29)) return "f16c";
  if (!system_saves(kYmmState)) return "saved YMM registers";
  return nullptr;
}

const char* missing_avx512() {
  if (const char* missing = missing_avx2()) return missing;
  const Registers seven = cpuid(7, 0);
  if (!bit(seven.ebx, 16)) return "avx512f";
  if (!bit(seven.ebx, 17)) return "avx512dq";
  if (!bit(seven.ebx, 30)) return "avx512bw";
  if (!bit(seven.ebx, 31)) return "avx512vl";
  if (!system_saves(kZmmState)) return "saved ZMM registers";
  return nullptr;
}

const char* missing_avx512bf16() {
  if (const char* missing = missing_avx512()) return missing;
  if (!bit(cpuid(7, 1).eax, 5)) return "avx512_bf16";
  return nullptr;
}

const char* missing_amx() {
  if (const char* missing = missing_avx512bf16()) return missing;
  const Registers seven = cpuid(7, 0);
  if (!bit(seven.edx, 24)) return "amx_tile";
  if (!bit(seven.edx, 22)) return "amx_bf16";
  if (!system_saves(kTileState)) return "saved tile registers";
  if (!amx_permitted()) return "permission to use amx_tile";
  return nullptr;
}

}  // namespace

const char* isa_name(int isa) {
  constexpr const char* kNames[kNumIsas] = {"scalar", "avx2", "avx512", "avx512bf16", "amx", "amx_emulated"};
  return kNames[isa];
}

const char* missing_feature(int isa) {
  switch (isa) {
    case kScalar:
      return nullptr;
    case kAvx2:
      return missing_avx2();
    case kAvx512:
      return missing_avx512();
    case kAmx:
      return missing_amx();
    default:
      return missing_avx512bf16();
  }
}

}  // namespace rankernel
