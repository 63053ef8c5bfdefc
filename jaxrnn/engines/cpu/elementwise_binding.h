// Linear recurrences of single units as targets of the XLA FFI. Every shape is checked here, before a pointer is used.

#pragma once
#include <initializer_list>
#include <string>

#include "memory.h"
#include "problem.h"
#include "shapes.h"
#include "threads.h"

namespace jaxrnn::JAXRNN_NUMBERS {
namespace {

ElementwiseProblem problem(Shapes& shapes, bool reverse, int64_t unit, int64_t taps, double bound, Floats& xs, Floats& w, Floats& h,
                           Floats& b, Floats& theta, Floats& w_y, Flags& valid, Flags& start, Flags& begun,
                           Floats& fresh) {
  ElementwiseProblem p{};
  const auto input = xs.dimensions(), weight = w.dimensions(), state = h.dimensions();
  if (unit < 0 || unit >= UNITS) return shapes.fail("unit"), p;
  p.unit = static_cast<Unit>(unit), p.reverse = reverse, p.bound = static_cast<Real>(bound);
  if (input.size() != 3) return shapes.fail("xs"), p;
  if (weight.size() != 4 || weight[0] < 1 || weight[1] < 1) return shapes.fail("w"), p;
  const long E = states_of(p.unit), S = sums_of(p.unit), K = theta_of(p.unit);
  if (state.size() != 2 || state[1] < 1 || state[1] % E) return shapes.fail("h"), p;
  if (taps < 1 || input[0] < taps) return shapes.fail("xs"), p;
  const long L = p.taps = taps, T = p.steps = input[0] - L + 1;
  const long R = p.rows = state[0], H = p.units = state[1] / E, D = p.inputs = input[2];
  const long M = p.members = weight[0], N = p.heads = weight[1];
  if (R % M) return shapes.fail("h"), p;
  if (D < 1 || D % N || H % N || (reads_x(p.unit) && D != H) || (L > 1 && (N > 1 || reads_x(p.unit))))
    return shapes.fail("w"), p;
  p.xs = shapes.is("xs", xs, {T + L - 1, R, D}), p.w = shapes.is("w", w, {M, N, L * D / N, S * H / N}), p.h = h.typed_data();
  p.b = shapes.optional("b", b, {M, S * H});
  p.theta = shapes.optional("theta", theta, {M, K * H});
  if (K && !p.theta) shapes.fail("theta");
  const auto output = w_y.dimensions();
  if (projects(p.unit) && (output.size() != 3 || output[2] < 1)) return shapes.fail("w_y"), p;
  p.outputs = projects(p.unit) ? output[2] : E * H;
  p.w_y = shapes.optional("w_y", w_y, {M, E * H, p.outputs});
  p.valid = reinterpret_cast<const uint8_t*>(shapes.optional("valid", valid, {T, R}));
  p.start = reinterpret_cast<const uint8_t*>(shapes.optional("start", start, {T, R}));
  p.begun = reinterpret_cast<const uint8_t*>(shapes.optional("begun", begun, {T, R}));
  p.fresh = shapes.optional("fresh", fresh, {R, E * H});
  return p;
}

ffi::Error elementwise_forward(bool reverse, int64_t unit, int64_t taps, double bound, Floats xs, Floats w, Floats h, Floats b,
                               Floats theta, Floats w_y, Flags valid, Flags start, Flags begun, Floats fresh, Written ys,
                               Written last, Written hs, Written sums) {
  Shapes shapes;
  ElementwiseProblem p = problem(shapes, reverse, unit, taps, bound, xs, w, h, b, theta, w_y, valid, start, begun, fresh);
  if (shapes.failed()) return shapes.error();
  const long width = states_of(p.unit) * p.units;
  p.ys = shapes.is("ys", *ys, {p.steps, p.rows, p.outputs});
  p.last = shapes.is("last", *last, {p.rows, width});
  p.hs = shapes.optional("hs", *hs, {p.steps, p.rows, width});
  p.sums = shapes.optional("sums", *sums, {p.steps, p.rows, sums_of(p.unit) * p.units});
  if (shapes.failed()) return shapes.error();
  for (Written each : {ys, hs, sums}) in_large_pages(each->typed_data(), each->size_bytes());
  elementwise(p, Pool::threads());
  return ffi::Error::Success();
}

ffi::Error elementwise_cotangents(bool reverse, int64_t unit, int64_t taps, double bound, Floats xs, Floats w, Floats h, Floats b, Floats theta, Floats w_y, Flags valid, Flags start, Flags begun, Floats fresh, Floats ys,
                                  Floats hs, Floats sums, Floats d_ys, Floats d_last, Written d_xs, Written d_w, Written d_h,
                                  Written d_b, Written d_theta, Written d_fresh, Written d_w_y) {
  Shapes shapes;
  ElementwiseProblem p = problem(shapes, reverse, unit, taps, bound, xs, w, h, b, theta, w_y, valid, start, begun, fresh);
  if (shapes.failed()) return shapes.error();
  const long T = p.steps, R = p.rows, H = p.units, D = p.taps * p.inputs, M = p.members, N = p.heads;
  const long S = sums_of(p.unit), width = states_of(p.unit) * H;
  p.ys = shapes.is("ys", ys, {T, R, p.outputs});  // the backward pass only reads them
  p.hs = shapes.optional("hs", hs, {T, R, width});
  p.sums = shapes.optional("sums", sums, {T, R, S * H});
  if (!p.hs && T * R && (p.valid || gives_y(p.unit))) shapes.fail("hs");
  ElementwiseGradient g{};
  g.d_ys = shapes.is("d_ys", d_ys, {T, R, p.outputs});
  g.d_last = shapes.is("d_last", d_last, {R, width});
  g.d_h = shapes.is("d_h", *d_h, {R, width});
  g.d_xs = shapes.optional("d_xs", *d_xs, {T, R, D});
  g.d_w = shapes.optional("d_w", *d_w, {M, N, D / N, S * H / N});
  g.d_b = shapes.optional("d_b", *d_b, {M, S * H});
  g.d_theta = shapes.optional("d_theta", *d_theta, {M, theta_of(p.unit) * H});
  g.d_fresh = shapes.optional("d_fresh", *d_fresh, {R, width});
  g.d_w_y = shapes.optional("d_w_y", *d_w_y, {M, width, p.outputs});
  if (shapes.failed()) return shapes.error();
  if (g.d_xs) in_large_pages(g.d_xs, d_xs->size_bytes());
  elementwise_backward(p, g, Pool::threads());
  return ffi::Error::Success();
}

}  // namespace

#define ELEMENTWISE_CALL                  \
  ffi::Ffi::Bind()          \
      .Attr<bool>("reverse")     \
      .Attr<int64_t>("unit")     \
      .Attr<int64_t>("taps")     \
      .Attr<double>("bound") ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY FLAGS FLAGS FLAGS ARRAY

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_elementwise_forward), elementwise_forward, ELEMENTWISE_CALL RESULT RESULT RESULT RESULT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_elementwise_backward), elementwise_cotangents,
                              ELEMENTWISE_CALL ARRAY ARRAY ARRAY ARRAY ARRAY RESULT RESULT RESULT RESULT RESULT RESULT RESULT);
#pragma GCC visibility pop

}  // namespace jaxrnn::JAXRNN_NUMBERS
