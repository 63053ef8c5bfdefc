// The kernels of gated recurrences with options, once for each instruction set.

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
#include "activations.h"
#include "families.h"
#include "staged.h"
#include "staged_forward.h"
#include "staged_backward.h"
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
#include "activations.h"
#include "families.h"
#include "staged.h"
#include "staged_forward.h"
#include "staged_backward.h"
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
#include "activations.h"
#include "families.h"
#include "staged.h"
#include "staged_forward.h"
#include "staged_backward.h"
}  // namespace avx512
#undef JAXRNN_WIDTH
#pragma GCC pop_options
#endif

void staged(const StagedForward& p, int threads) {
#if defined(JAXRNN_CHOICE)
  static const Instructions best = best_instructions();
  if (best == Instructions::kAvx512) return avx512::run_staged(p, threads);
  if (best == Instructions::kAvx2) return avx2::run_staged(p, threads);
#endif
  baseline::run_staged(p, threads);
}

void staged_backward(const StagedBackward& p, int threads) {
#if defined(JAXRNN_CHOICE)
  static const Instructions best = best_instructions();
  if (best == Instructions::kAvx512) return avx512::run_staged_backward(p, threads);
  if (best == Instructions::kAvx2) return avx2::run_staged_backward(p, threads);
#endif
  baseline::run_staged_backward(p, threads);
}

}  // namespace jaxrnn::JAXRNN_NUMBERS
