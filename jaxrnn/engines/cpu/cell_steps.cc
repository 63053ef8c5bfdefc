// The kernels of single steps, once for each instruction set. Memory is what takes the time, and wide vectors would slow
// the processor down for all that the caller does between two steps.

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

#include "cell_steps.h"
#include "memory.h"
#include "problem.h"
#include "threads.h"

namespace jaxrnn::JAXRNN_NUMBERS {

#define JAXRNN_KERNELS "cell_steps_kernels.h"
#include "instruction_sets.h"

#if defined(JAXRNN_CHOICE)
#define JAXRNN_BEST(run, widest)                               \
  (best_instructions() == Instructions::kAvx512 ? widest::run \
   : best_instructions() == Instructions::kAvx2 ? avx2::run   \
                                                : baseline::run)
#else
#define JAXRNN_BEST(run, widest) baseline::run
#endif

template <class Problem>
using Run = void (*)(const Problem&, int threads);

void delta_step(const DeltaStep& p, int threads) {
  static const Run<DeltaStep> run = JAXRNN_BEST(run_delta_step, avx2);
  run(p, threads);
}

void rwkv7_step(const Rwkv7Step& p, int threads) {
  static const Run<Rwkv7Step> run = JAXRNN_BEST(run_rwkv7_step, avx2);
  run(p, threads);
}

void s4d_step(const S4dStep& p, int threads) {
  static const Run<S4dStep> run = JAXRNN_BEST(run_s4d_step, avx512);  // which computes more than it reads
  run(p, threads);
}

}  // namespace jaxrnn::JAXRNN_NUMBERS
