// The kernels once for each instruction set, and the choice among them when the program runs.

#if defined(__x86_64__) && !defined(__clang__)  // which has no target for a part of a file
#define JAXRNN_CHOICE
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "problem.h"
#include "threads.h"

// A call of a function of vectors would cost more than the function.
#define JAXRNN_INLINE inline __attribute__((always_inline))

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross the boundary of this file

namespace jaxrnn {

#define JAXRNN_WIDTH 16
namespace baseline {
#include "simd.h"
#include "tile.h"
#include "pointwise.h"
#include "forward.h"
#include "backward.h"
#include "step.h"
#include "table.h"
}  // namespace baseline
#undef JAXRNN_WIDTH

#if defined(JAXRNN_CHOICE)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define JAXRNN_WIDTH 32
namespace avx2 {
#include "simd.h"
#include "tile.h"
#include "pointwise.h"
#include "forward.h"
#include "backward.h"
#include "step.h"
#include "table.h"
}  // namespace avx2
#undef JAXRNN_WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#define JAXRNN_WIDTH 64
namespace avx512 {
#include "simd.h"
#include "tile.h"
#include "pointwise.h"
#include "forward.h"
#include "backward.h"
#include "step.h"
#include "table.h"
}  // namespace avx512
#undef JAXRNN_WIDTH
#pragma GCC pop_options
#endif

const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(JAXRNN_CHOICE)
    const char* limit = std::getenv("JAXRNN_INSTRUCTIONS");
    const bool any = limit == nullptr;
    if ((any || !std::strcmp(limit, "avx512")) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      return avx512::table("avx512");
    if ((any || !std::strcmp(limit, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return avx2::table("avx2");
#endif
    return baseline::table("baseline");
  }();
  return chosen;
}

}  // namespace jaxrnn
