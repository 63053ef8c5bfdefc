// The kernels of linear recurrences of single units, once for each instruction set.

#include "instructions.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "memory.h"
#include "problem.h"
#include "threads.h"

namespace jaxrnn::JAXRNN_NUMBERS {

#define JAXRNN_WIDTH 16
namespace baseline {
#include "simd.h"
#include "team.h"
#include "tile.h"
#include "units.h"
#include "elementwise.h"
}  // namespace baseline
#undef JAXRNN_WIDTH

#if defined(JAXRNN_CHOICE)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define JAXRNN_WIDTH 32
namespace avx2 {
#include "simd.h"
#include "team.h"
#include "tile.h"
#include "units.h"
#include "elementwise.h"
}  // namespace avx2
#undef JAXRNN_WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#define JAXRNN_WIDTH 64
namespace avx512 {
#include "simd.h"
#include "team.h"
#include "tile.h"
#include "units.h"
#include "elementwise.h"
}  // namespace avx512
#undef JAXRNN_WIDTH
#pragma GCC pop_options
#endif

void elementwise(const ElementwiseProblem& p, int threads) {
#if defined(JAXRNN_CHOICE)
  static const Instructions best = best_instructions();
  if (best == Instructions::kAvx512) return avx512::run_elementwise(p, threads);
  if (best == Instructions::kAvx2) return avx2::run_elementwise(p, threads);
#endif
  baseline::run_elementwise(p, threads);
}

void elementwise_backward(const ElementwiseProblem& p, const ElementwiseGradient& g, int threads) {
#if defined(JAXRNN_CHOICE)
  static const Instructions best = best_instructions();
  if (best == Instructions::kAvx512) return avx512::run_elementwise_backward(p, g, threads);
  if (best == Instructions::kAvx2) return avx2::run_elementwise_backward(p, g, threads);
#endif
  baseline::run_elementwise_backward(p, g, threads);
}

}  // namespace jaxrnn::JAXRNN_NUMBERS
