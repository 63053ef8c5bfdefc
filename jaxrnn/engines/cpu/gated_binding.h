// The kernels as targets of the XLA FFI. Every shape is checked here, before a pointer is used.

#pragma once
#include <algorithm>
#include <cstring>

#include "members.h"
#include "problem.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxrnn::JAXRNN_NUMBERS {
namespace {

// What both passes are told, and read first.
struct Problem {
  Kind kind = Kind::kLstm;
  Sizes n{};
  long M = 0, G = 0, first = 0, second = 0;  // first, second: steps and rows in the order of the arrays
  int64_t directions, pattern;
  Members<const Real> xs, w_x, w_h, h, c, fresh_h, fresh_c;
  Members<const uint8_t> valid, start;

  bool lstm() const { return kind == Kind::kLstm; }

  // `directions`: bit k tells that member k runs from the last step to the first, again after `pattern` members.
  ffi::Error read(Arrays& arrays, int64_t kind_number, bool batch_major, int64_t directions_, int64_t pattern_, int64_t members) {
    long x[4], w[3];
    if (kind_number < 0 || kind_number >= KINDS || pattern_ < 1 || members < 0 ||
        !arrays.shape(0, 4, x) || !arrays.shape(1, 3, w) || !arrays.shape(2, 3, w))
      return ffi::Error::InvalidArgument("jaxrnn: unknown kind, or xs, w_x or w_h of another rank");
    kind = static_cast<Kind>(kind_number), directions = directions_, pattern = pattern_, M = members;
    first = x[1], second = x[2];
    n = Sizes{batch_major ? x[2] : x[1], batch_major ? x[1] : x[2], x[3], w[1], false, batch_major};
    G = gates_of(kind) * n.units;
    return ffi::Error::Success();
  }

  void take(Arrays& arrays) {
    const long B = n.rows, D = n.inputs, H = n.units;
    xs = arrays.floats("xs", {first, second, D});
    w_x = arrays.floats("w_x", {D, G});
    w_h = arrays.floats("w_h", {H, G});
    h = arrays.floats("h", {B, H});
    c = arrays.floats("c", {B, H});
    fresh_h = arrays.floats("fresh_h", {B, H});
    fresh_c = arrays.floats("fresh_c", {B, H});
    valid = arrays.flags("valid", {first, second});
    start = arrays.flags("start", {first, second});
    const bool steps = M * B * n.steps != 0, fresh = steps && start.first != nullptr;
    arrays.need("xs", xs, steps && D != 0);
    arrays.need("w_x", w_x, D != 0);
    arrays.need("w_h", w_h, true);
    arrays.need("h", h, M * B != 0);
    arrays.need("c", c, M * B != 0 && lstm());
    arrays.need("fresh_h", fresh_h, fresh);
    arrays.need("fresh_c", fresh_c, fresh && lstm());
  }

  Sizes sizes(long member) const {
    Sizes found = n;
    found.reverse = (directions >> (member % pattern)) & 1;
    return found;
  }
  void fill(Inputs& p, long m) const {
    p.xs = xs[m], p.w_x = w_x[m], p.w_h = w_h[m], p.h = h[m], p.c = c[m], p.fresh_h = fresh_h[m];
    p.fresh_c = fresh_c[m], p.valid = valid[m], p.start = start[m];
  }
};

ffi::Error gated_forward(int64_t kind, bool batch_major, int64_t directions, int64_t pattern, int64_t members, int64_t here,
                         ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  Arrays arrays(arguments, results, members, here);
  Problem q;
  if (ffi::Error error = q.read(arrays, kind, batch_major, directions, pattern, members); error.failure()) return error;
  q.take(arrays);
  const long B = q.n.rows, H = q.n.units, first = q.first, second = q.second;
  const auto b = arrays.floats("b", {q.G}), b_hn = arrays.floats("b_hn", {H});
  const auto ys = arrays.result("ys", {first, second, H});
  const auto last_h = arrays.result("last_h", {B, H}), last_c = arrays.result("last_c", {B, H});
  const auto kept = arrays.result("kept", {first, second, kept_of(q.kind) * H}), cs = arrays.result("cs", {first, second, H});
  arrays.need("ys", ys, q.M * B * q.n.steps != 0);
  arrays.need("last_h", last_h, q.M * B != 0);
  arrays.need("last_c", last_c, q.M * B != 0 && q.lstm());
  if (ffi::Error error = arrays.error(); error.failure()) return error;
  if (q.M == 0 || B == 0) return ffi::Error::Success();
  return each_member(q.M, q.G * q.n.units, [&](long m, int threads) {
    Forward p{};
    q.fill(p, m);
    p.b = b[m], p.b_hn = b_hn[m], p.ys = ys[m], p.last_h = last_h[m], p.last_c = last_c[m], p.kept = kept[m], p.cs = cs[m];
    forward(q.kind, q.sizes(m), p, threads);
  });
}

ffi::Error gated_backward(int64_t kind, bool batch_major, int64_t directions, int64_t pattern, int64_t members, int64_t here,
                          ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  Arrays arrays(arguments, results, members, here);
  Problem q;
  if (ffi::Error error = q.read(arrays, kind, batch_major, directions, pattern, members); error.failure()) return error;
  q.take(arrays);
  const long B = q.n.rows, D = q.n.inputs, H = q.n.units, G = q.G, first = q.first, second = q.second;
  const auto ys = arrays.floats("ys", {first, second, H});
  const auto kept = arrays.floats("kept", {first, second, kept_of(q.kind) * H});
  const auto cs = arrays.floats("cs", {first, second, H}), d_ys = arrays.floats("d_ys", {first, second, H});
  const auto d_last_h = arrays.floats("d_last_h", {B, H}), d_last_c = arrays.floats("d_last_c", {B, H});
  const auto d_xs = arrays.result("d_xs", {first, second, D});
  const auto d_w_x = arrays.result("d_w_x", {D, G}), d_w_h = arrays.result("d_w_h", {H, G});
  const auto d_h = arrays.result("d_h", {B, H}), d_c = arrays.result("d_c", {B, H});
  const auto d_fresh_h = arrays.result("d_fresh_h", {B, H}), d_fresh_c = arrays.result("d_fresh_c", {B, H});
  const auto d_b = arrays.result("d_b", {G}), d_b_hn = arrays.result("d_b_hn", {H});
  const bool rows = q.M * B != 0, steps = rows && q.n.steps != 0, fresh = steps && q.start.first != nullptr;
  arrays.need("ys", ys, steps);
  arrays.need("kept", kept, steps && kept_of(q.kind) != 0);
  arrays.need("cs", cs, steps && q.lstm());
  arrays.need("d_ys", d_ys, steps);
  arrays.need("d_last_h", d_last_h, rows);
  arrays.need("d_last_c", d_last_c, rows && q.lstm());
  arrays.need("d_w_h", d_w_h, d_w_x.first != nullptr);
  arrays.need("d_h", d_h, rows);
  arrays.need("d_c", d_c, rows && q.lstm());
  arrays.need("d_fresh_h", d_fresh_h, fresh);
  arrays.need("d_fresh_c", d_fresh_c, fresh && q.lstm());
  if (ffi::Error error = arrays.error(); error.failure()) return error;
  if (B == 0) {  // nothing is summed
    for (const auto& [array, size] : {std::pair(d_w_x, D * G), {d_w_h, H * G}, {d_b, G}, {d_b_hn, H}})
      if (array.first) std::memset(array.first, 0, q.M * size * sizeof(Real));
    return ffi::Error::Success();
  }
  return each_member(q.M, q.G * q.n.units, [&](long m, int threads) {
    Backward p{};
    q.fill(p, m);
    p.ys = ys[m], p.kept = kept[m], p.cs = cs[m];
    p.d_ys = d_ys[m], p.d_last_h = d_last_h[m], p.d_last_c = d_last_c[m];
    p.d_xs = d_xs[m], p.d_w_x = d_w_x[m], p.d_b = d_b[m], p.d_w_h = d_w_h[m], p.d_b_hn = d_b_hn[m];
    p.d_h = d_h[m], p.d_c = d_c[m], p.d_fresh_h = d_fresh_h[m], p.d_fresh_c = d_fresh_c[m];
    backward(q.kind, q.sizes(m), p, threads);
  });
}

}  // namespace

#define GATED_CALL                     \
  ffi::Ffi::Bind()                    \
      .Attr<int64_t>("kind")               \
      .Attr<bool>("batch_major")           \
      .Attr<int64_t>("directions")         \
      .Attr<int64_t>("pattern")            \
      .Attr<int64_t>("members")            \
      .Attr<int64_t>("here")               \
      .RemainingArgs()                     \
      .RemainingRets()

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_gated_forward), gated_forward, GATED_CALL);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_gated_backward), gated_backward, GATED_CALL);

#ifndef JAXRNN_FLOAT64
extern "C" {
const char* jaxrnn_jaxlib() { return JAXRNN_JAXLIB; }  // whose headers this was compiled with
const char* jaxrnn_instructions() { return instructions(); }
int jaxrnn_threads() { return Pool::threads(); }
}
#endif
#pragma GCC visibility pop

}  // namespace jaxrnn::JAXRNN_NUMBERS
