// The instruction sets that kernels are compiled for, and the choice among them when the program runs.

#pragma once
// clang has no target for a part of a file.
#if defined(__x86_64__) && !defined(__clang__) && !defined(JAXRNN_BASELINE)
#define JAXRNN_CHOICE
#include <immintrin.h>
#endif

#include <cstdlib>
#include <cstring>

// A call of a function of vectors would cost more than the function.
#define JAXRNN_INLINE inline __attribute__((always_inline))
// A copy for every caller would only be more to compile.
#define JAXRNN_APART inline __attribute__((noinline))

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross the boundary of a file

namespace jaxrnn {

enum class Instructions { kBaseline, kAvx2, kAvx512 };

inline Instructions best_instructions() {
#if defined(JAXRNN_CHOICE)
  const char* limit = std::getenv("JAXRNN_INSTRUCTIONS");
  auto may = [&](const char* name) { return limit == nullptr || !std::strcmp(limit, name); };
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (may("avx512") && has_avx512) return Instructions::kAvx512;
  if (may("avx2") && has_avx2) return Instructions::kAvx2;
#endif
  return Instructions::kBaseline;
}

}  // namespace jaxrnn
