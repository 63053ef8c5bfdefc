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

#define JAXRNN_KERNELS "staged_kernels.h"
#include "instruction_sets.h"

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
