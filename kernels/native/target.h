// Which functions may use which instructions. The files are compiled without -march, so that one
// library runs everywhere; a function marked TARGET_* is called only after the processor was asked.
#pragma once

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#else
#define ALWAYS_INLINE inline
#define NEVER_INLINE
#endif

// MOETIER_PORTABLE_ONLY builds what a processor that is not x86 gets.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOETIER_PORTABLE_ONLY)
#define MOETIER_X86 1
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,f16c,fma")))
#else
#define MOETIER_X86 0
#endif
