// The kernels once for each instruction set, and the choice among them when the program runs.

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

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*forward[KINDS])(const Sizes&, const Forward&, int threads);
  void (*backward[KINDS])(const Sizes&, const Backward&, int threads);
  void (*step[KINDS])(const Sizes&, const Forward&, int threads);  // a single one
  void (*small_step[KINDS])(const Sizes&, const Forward&, int threads);
  void (*linear)(const LinearProblem&, int threads);
  void (*matrix)(const MatrixProblem&, int threads);
  void (*matrix_backward)(const MatrixProblem&, const MatrixGradient&, int threads);
  void (*diagonal)(const DiagonalProblem&, int threads);
  void (*diagonal_backward)(const DiagonalProblem&, const DiagonalGradient&, int threads);
};

template <class F>
void each_kind(const F& f) {
  f(std::integral_constant<Kind, Kind::kElmanTanh>{});
  f(std::integral_constant<Kind, Kind::kElmanRelu>{});
  f(std::integral_constant<Kind, Kind::kLstm>{});
  f(std::integral_constant<Kind, Kind::kGru>{});
  f(std::integral_constant<Kind, Kind::kGruBefore>{});
}

#define JAXRNN_KERNELS "table.h"
#include "instruction_sets.h"

#if defined(JAXRNN_CHOICE)
#define JAXRNN_FMA
#define JAXRNN_WIDTH 16
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace fma {
#include "simd.h"
#include "team.h"
#include "tile.h"
#include "pointwise.h"
#include "step.h"
}  // namespace fma
#undef JAXRNN_WIDTH
#undef JAXRNN_FMA
#pragma GCC pop_options
#endif

static const Kernels& kernels() {
  static const Kernels chosen = [] {
    Kernels kernels = baseline::table("baseline");
    baseline::enter_steps(kernels.step);
    baseline::enter_steps(kernels.small_step);
#if defined(JAXRNN_CHOICE)
    const Instructions best = best_instructions();
    if (best != Instructions::kBaseline) {
      kernels = best == Instructions::kAvx512 ? avx512::table("avx512") : avx2::table("avx2");
      avx2::enter_steps(kernels.step);
      fma::enter_steps(kernels.small_step);
    }
#endif
    return kernels;
  }();
  return chosen;
}

constexpr long SMALL = 1 << 17;  // weights that half of a second-level cache holds: another thread would not pay

void forward(Kind kind, const Sizes& n, const Forward& p, int threads) {
  const int k = static_cast<int>(kind);
  const bool step = n.steps == 1 && n.rows <= 2 && !p.kept && !p.cs && !p.valid && !p.start;
  const long weights = (n.inputs + n.units) * gates_of(kind) * n.units;
  if (!step) kernels().forward[k](n, p, threads);
  else if (weights <= SMALL) kernels().small_step[k](n, p, 1);
  else kernels().step[k](n, p, static_cast<int>(std::min<long>(threads, 2 * weights / SMALL)));
}

void backward(Kind kind, const Sizes& n, const Backward& p, int threads) {
  kernels().backward[static_cast<int>(kind)](n, p, threads);
}

void linear(const LinearProblem& p, int threads) { kernels().linear(p, threads); }

void matrix(const MatrixProblem& p, int threads) { kernels().matrix(p, threads); }

void matrix_backward(const MatrixProblem& p, const MatrixGradient& g, int threads) {
  kernels().matrix_backward(p, g, threads);
}

void diagonal(const DiagonalProblem& p, int threads) { kernels().diagonal(p, threads); }

void diagonal_backward(const DiagonalProblem& p, const DiagonalGradient& g, int threads) {
  kernels().diagonal_backward(p, g, threads);
}

const char* instructions() { return kernels().name; }

}  // namespace jaxrnn::JAXRNN_NUMBERS
