// What this processor and operating system can run. Compiled at baseline.
#pragma once

namespace rankernel {

// Instruction sets in rising order of preference. kAmxEmulated runs the AMX kernels on software tiles, for tests on
// machines without AMX; it is built on request only and never chosen by itself.
enum Isa : int { kScalar = 0, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated, kNumIsas };

const char* isa_name(int isa);

// Null where `isa` can run, else the first feature that is missing. Tests every feature that the flags of that
// instruction set's files name (CMakeLists.txt), that the system saves the registers, and the AMX permission.
const char* missing_feature(int isa);

}  // namespace rankernel
