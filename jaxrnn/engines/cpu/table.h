// The kernels of one instruction set.

#include "simd.h"
#include "team.h"
#include "tile.h"
#include "products.h"
#include "pointwise.h"
#include "forward.h"
#include "backward.h"
#include "linear.h"
#include "columns.h"
#include "matrix.h"
#include "matrix_backward.h"
#include "diagonal.h"
#if JAXRNN_WIDTH < 64
#include "step.h"
#endif

template <Kind K>
inline void run_forward(const Sizes& n, const Forward& p, int threads) {
  ForwardRun<K>(n, p, threads).run();
}

template <Kind K>
inline void run_backward(const Sizes& n, const Backward& p, int threads) {
  BackwardRun<K>(n, p, threads).run();
}

inline Kernels table(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  kernels.linear = run_linear;
  kernels.matrix = run_matrix;
  kernels.matrix_backward = run_matrix_backward;
  kernels.diagonal = run_diagonal;
  kernels.diagonal_backward = run_diagonal_backward;
  each_kind([&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    kernels.forward[static_cast<int>(K)] = run_forward<K>;
    kernels.backward[static_cast<int>(K)] = run_backward<K>;
  });
  return kernels;
}
