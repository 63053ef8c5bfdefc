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

#define JAXRNN_KERNELS "elementwise_kernels.h"
#include "instruction_sets.h"

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
