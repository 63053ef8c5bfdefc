// Linear recurrences of single units as targets of the XLA FFI. Every shape is checked here, before a pointer is used.

#include <initializer_list>
#include <string>

#include "memory.h"
#include "problem.h"
#include "shapes.h"
#include "threads.h"

namespace jaxrnn {
namespace {

ElementwiseProblem problem(Shapes& shapes, bool reverse, int64_t unit, float bound, Floats& u, Floats& h, Floats& b,
                           Floats& x, Floats& rate, Flags& valid, Flags& start, Flags& begun, Floats& fresh) {
  ElementwiseProblem p{};
  const auto state = h.dimensions(), sums = u.dimensions(), bias = b.dimensions(), rates = rate.dimensions();
  if (unit < 0 || unit >= UNITS) return shapes.fail("unit"), p;
  if (state.size() != 2 || sums.size() != 3) return shapes.fail("u"), p;
  p.unit = static_cast<Unit>(unit), p.reverse = reverse, p.bound = bound;
  const long T = p.steps = sums[0], R = p.rows = state[0], H = p.units = state[1], S = sums_of(p.unit);
  p.members = b.element_count() && bias.size() == 2 ? bias[0] : rate.element_count() && rates.size() == 2 ? rates[0] : 1;
  if (p.members < 1 || R % p.members) return shapes.fail("h"), p;
  p.u = shapes.is("u", u, {T, R, S * H}), p.h = h.typed_data();
  p.b = shapes.optional("b", b, {p.members, S * H});
  p.x = shapes.optional("x", x, {T, R, H});
  p.rate = shapes.optional("rate", rate, {p.members, H});
  p.valid = reinterpret_cast<const uint8_t*>(shapes.optional("valid", valid, {T, R}));
  p.start = reinterpret_cast<const uint8_t*>(shapes.optional("start", start, {T, R}));
  p.begun = reinterpret_cast<const uint8_t*>(shapes.optional("begun", begun, {T, R}));
  p.fresh = shapes.optional("fresh", fresh, {R, H});
  return p;
}

ffi::Error elementwise_forward(bool reverse, int64_t unit, float bound, Floats u, Floats h, Floats b, Floats x,
                               Floats rate, Flags valid, Flags start, Flags begun, Floats fresh, Written ys,
                               Written last, Written hs) {
  Shapes shapes;
  ElementwiseProblem p = problem(shapes, reverse, unit, bound, u, h, b, x, rate, valid, start, begun, fresh);
  if (shapes.failed()) return shapes.error();
  p.ys = shapes.is("ys", *ys, {p.steps, p.rows, p.units});
  p.last = shapes.is("last", *last, {p.rows, p.units});
  p.hs = shapes.optional("hs", *hs, {p.steps, p.rows, p.units});
  if (shapes.failed()) return shapes.error();
  for (Written each : {ys, hs}) in_large_pages(each->typed_data(), each->size_bytes());
  elementwise(p, Pool::threads());
  return ffi::Error::Success();
}

ffi::Error elementwise_cotangents(bool reverse, int64_t unit, float bound, Floats u, Floats h, Floats b, Floats x,
                                  Floats rate, Flags valid, Flags start, Flags begun, Floats fresh, Floats ys,
                                  Floats hs, Floats d_ys, Floats d_last, Written d_u, Written d_h, Written d_b,
                                  Written d_x, Written d_rate, Written d_fresh) {
  Shapes shapes;
  ElementwiseProblem p = problem(shapes, reverse, unit, bound, u, h, b, x, rate, valid, start, begun, fresh);
  if (shapes.failed()) return shapes.error();
  const long T = p.steps, R = p.rows, H = p.units, S = sums_of(p.unit);
  p.ys = shapes.is("ys", ys, {T, R, H});  // the backward pass only reads them
  p.hs = shapes.optional("hs", hs, {T, R, H});
  if (!p.hs && T * R * H && (p.valid || reads_state(p.unit))) shapes.fail("hs");
  ElementwiseGradient g{};
  g.d_ys = shapes.is("d_ys", d_ys, {T, R, H});
  g.d_last = shapes.is("d_last", d_last, {R, H});
  g.d_u = shapes.is("d_u", *d_u, {T, R, S * H});
  g.d_h = shapes.is("d_h", *d_h, {R, H});
  if (p.b) g.d_b = shapes.is("d_b", *d_b, {R, S * H});
  if (p.x) g.d_x = shapes.is("d_x", *d_x, {T, R, H});
  if (p.rate) g.d_rate = shapes.is("d_rate", *d_rate, {R, H});
  if (p.fresh) g.d_fresh = shapes.is("d_fresh", *d_fresh, {R, H});
  if (shapes.failed()) return shapes.error();
  in_large_pages(g.d_u, d_u->size_bytes());
  elementwise_backward(p, g, Pool::threads());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxrnn

#define ARRAY .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
#define FLAGS .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
#define RESULT .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
#define PROBLEM                  \
  xla::ffi::Ffi::Bind()          \
      .Attr<bool>("reverse")     \
      .Attr<int64_t>("unit")     \
      .Attr<float>("bound") ARRAY ARRAY ARRAY ARRAY ARRAY FLAGS FLAGS FLAGS ARRAY

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxrnn_elementwise_forward, jaxrnn::elementwise_forward, PROBLEM RESULT RESULT RESULT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxrnn_elementwise_backward, jaxrnn::elementwise_cotangents,
                              PROBLEM ARRAY ARRAY ARRAY ARRAY RESULT RESULT RESULT RESULT RESULT RESULT);
#pragma GCC visibility pop
