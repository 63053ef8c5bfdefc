// Diagonal recurrences as targets of the XLA FFI. Every shape is checked here, before a pointer is used.

#pragma once
#include <algorithm>
#include <initializer_list>

#include "memory.h"
#include "problem.h"
#include "shapes.h"
#include "threads.h"

namespace jaxrnn::JAXRNN_NUMBERS {
namespace {

DiagonalProblem problem(Shapes& shapes, bool reverse, int64_t chunk, Floats& x, Floats& a, Floats& b, Floats& c,
                        Floats& h, Floats& step, Flags& valid, Flags& start, Floats& fresh) {
  DiagonalProblem p{};
  const auto sequence = x.dimensions(), weights = a.dimensions();
  if (sequence.size() != 3 || weights.size() != 3 || weights[0] < 1 || sequence[1] % weights[0] || chunk < 1) {
    shapes.fail("x");
    return p;
  }
  const long T = p.steps = sequence[0], R = p.rows = sequence[1], D = p.channels = sequence[2];
  const long M = p.members = weights[0], N = p.states = weights[1];
  p.reverse = reverse, p.chunk = chunk, p.groups = 1;
  p.x = x.typed_data();
  p.a = shapes.is("a", a, {M, N, D});
  p.h = shapes.is("h", h, {R, N, D});
  p.step = shapes.optional("step", step, {T, R, D});
  p.b = p.step ? shapes.is("b", b, {T, R, N}) : shapes.is("b", b, {M, N, D});
  p.c = p.step ? shapes.is("c", c, {T, R, N}) : shapes.is("c", c, {M, N, D});
  p.valid = reinterpret_cast<const uint8_t*>(shapes.optional("valid", valid, {T, R}));
  p.start = reinterpret_cast<const uint8_t*>(shapes.optional("start", start, {T, R}));
  p.fresh = shapes.optional("fresh", fresh, {R, N, D});
  if (!p.step && N % 2) shapes.fail("a");
  return p;
}

ffi::Error diagonal_forward(bool reverse, int64_t chunk, Floats x, Floats a, Floats b, Floats c, Floats h, Floats step,
                            Flags valid, Flags start, Floats fresh, Written ys, Written last, Written kept) {
  Shapes shapes;
  DiagonalProblem p = problem(shapes, reverse, chunk, x, a, b, c, h, step, valid, start, fresh);
  if (shapes.failed()) return shapes.error();
  p.ys = shapes.is("ys", *ys, {p.steps, p.rows, p.channels});
  p.last = shapes.is("last", *last, {p.rows, p.states, p.channels});
  p.kept = shapes.optional("kept", *kept, {(p.steps + chunk - 1) / chunk, p.rows, p.states, p.channels});
  if (shapes.failed()) return shapes.error();
  if (p.rows * p.channels * p.states == 0) return ffi::Error::Success();
  if (p.kept) in_large_pages(p.kept, kept->element_count() * sizeof(Real));
  diagonal(p, Pool::threads());
  return ffi::Error::Success();
}

ffi::Error diagonal_cotangents(bool reverse, int64_t chunk, Floats x, Floats a, Floats b, Floats c, Floats h, Floats step,
                               Flags valid, Flags start, Floats fresh, Floats kept, Floats d_ys, Floats d_last,
                               Written d_x, Written d_a, Written d_b, Written d_c, Written d_h, Written d_step,
                               Written d_fresh) {
  Shapes shapes;
  DiagonalProblem p = problem(shapes, reverse, chunk, x, a, b, c, h, step, valid, start, fresh);
  if (shapes.failed()) return shapes.error();
  const long T = p.steps, R = p.rows, N = p.states, D = p.channels;
  p.kept = shapes.is("kept", kept, {(T + chunk - 1) / chunk, R, N, D});  // which is only read
  DiagonalGradient g{};
  g.d_ys = shapes.is("d_ys", d_ys, {T, R, D});
  g.d_last = shapes.is("d_last", d_last, {R, N, D});
  g.d_x = shapes.optional("d_x", *d_x, {T, R, D});
  g.d_a = shapes.is("d_a", *d_a, {R, N, D});
  g.d_h = shapes.is("d_h", *d_h, {R, N, D});
  if (p.step) {
    const auto sums = d_b->dimensions();
    p.groups = sums.size() == 4 ? sums[0] : 0;
    if (p.groups < 1 || p.groups > std::max(D, 1l)) shapes.fail("d_b");
    g.d_b = shapes.is("d_b", *d_b, {p.groups, T, R, N});
    g.d_c = shapes.is("d_c", *d_c, {p.groups, T, R, N});
    g.d_step = shapes.is("d_step", *d_step, {T, R, D});
  } else {
    g.d_b = shapes.is("d_b", *d_b, {R, N, D});
    g.d_c = shapes.is("d_c", *d_c, {R, N, D});
  }
  if (p.fresh) g.d_fresh = shapes.is("d_fresh", *d_fresh, {R, N, D});
  if (shapes.failed()) return shapes.error();
  if (R * D * N == 0) return ffi::Error::Success();
  diagonal_backward(p, g, Pool::threads());
  return ffi::Error::Success();
}

}  // namespace

#define DIAGONAL_CALL           \
  ffi::Ffi::Bind()   \
      .Attr<bool>("reverse") \
      .Attr<int64_t>("chunk") ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY FLAGS FLAGS ARRAY

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_diagonal_forward), diagonal_forward, DIAGONAL_CALL RESULT RESULT RESULT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_diagonal_backward), diagonal_cotangents,
                              DIAGONAL_CALL ARRAY ARRAY ARRAY RESULT RESULT RESULT RESULT RESULT RESULT RESULT);
#pragma GCC visibility pop

}  // namespace jaxrnn::JAXRNN_NUMBERS
