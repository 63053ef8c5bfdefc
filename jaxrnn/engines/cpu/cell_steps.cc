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

#define JAXRNN_WIDTH 16
namespace baseline {
#include "simd.h"
#include "team.h"
#include "columns.h"
#include "matrix_step.h"
#include "diagonal_step.h"
}  // namespace baseline
#undef JAXRNN_WIDTH

#if defined(JAXRNN_CHOICE)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define JAXRNN_WIDTH 32
namespace avx2 {
#include "simd.h"
#include "team.h"
#include "columns.h"
#include "matrix_step.h"
#include "diagonal_step.h"
}  // namespace avx2
#undef JAXRNN_WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#define JAXRNN_WIDTH 64
namespace avx512 {
#include "simd.h"
#include "team.h"
#include "diagonal_step.h"
}  // namespace avx512
#undef JAXRNN_WIDTH
#pragma GCC pop_options
#endif

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
