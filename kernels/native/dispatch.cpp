// Which instruction set this processor has, and the product that belongs to it.
#include "moetier_kernels.h"
#include "multiply.h"
#include "target.h"

int32_t moetier_abi_version() { return 7; }

int32_t moetier_best_isa() {
#if MOETIER_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    return MOETIER_AVX512VNNI;
  if (avx2) return MOETIER_AVX2;  // every processor with AVX2 has the float16 conversions too
#endif
  return MOETIER_SCALAR;
}

moetier::Multiply* moetier::multiply_for(int isa) {
#if MOETIER_X86
  if (isa == MOETIER_AVX512VNNI) return multiply_avx512;
  if (isa == MOETIER_AVX2) return multiply_avx2;
#endif
  (void)isa;
  return multiply_portable;
}
