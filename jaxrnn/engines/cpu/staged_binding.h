// Gated recurrences with options as targets of the XLA FFI. Every shape is checked here, before a pointer is used.

#pragma once
#include <cstring>
#include <limits>

#include "members.h"
#include "problem.h"

namespace jaxrnn::JAXRNN_NUMBERS {
namespace {

// What both passes are told, and read first.
struct Call {
  StagedInputs all{};
  long M = 0, first = 0, second = 0;  // members; steps and rows in the order of the arrays
  int64_t directions = 0, pattern = 1;
  Members<const Real> xs, w_x, w_h, w_2, theta, h, rest, fresh_h, fresh_rest, mask;
  Members<const uint8_t> valid, start, stay_h, stay_rest;

  // `numbers`: codes of family and activations, and whether the gate that is there is i, of norm, projection, zoneout,
  // and heads; `values`: α and β of the activations, clips (0: none), and what stays of every state.
  ffi::Error read(const Arrays& arrays, ffi::Span<const int64_t> numbers, ffi::Span<const double> values, bool batch_major,
                  int64_t directions_, int64_t pattern_, int64_t members) {
    const auto wrong = ffi::Error::InvalidArgument("jaxrnn: unknown rule, or xs, w_x, h or c of another rank");
    long x[4], w[3], h_[3];
    if (numbers.size() != 9 || values.size() != 8 + MOST_STATES || pattern_ < 1 || members < 0 ||
        !arrays.shape(0, 4, x) || !arrays.shape(1, 3, w) || !arrays.shape(2, 3, h_))
      return wrong;
    Rule& rule = all.rule;
    if (numbers[0] < 0 || numbers[0] >= FAMILIES) return wrong;
    rule.family = static_cast<Family>(numbers[0]);
    Choice* const choices[] = {&rule.gate, &rule.candidate, &rule.output};
    for (int k = 0; k < 3; ++k) {
      if (numbers[1 + k] < 0 || numbers[1 + k] >= ACTIVATIONS) return wrong;
      *choices[k] = {numbers[1 + k], static_cast<Real>(values[2 * k]), static_cast<Real>(values[2 * k + 1])};
    }
    auto bound = [](double clip) { return clip > 0 ? static_cast<Real>(clip) : std::numeric_limits<Real>::infinity(); };
    rule.gate_clip = bound(values[6]), rule.cell_clip = bound(values[7]);
    rule.input = numbers[4], rule.norm = numbers[5], rule.projected = numbers[6], rule.zoned = numbers[7];
    rule.heads = numbers[8];
    for (int k = 0; k < MOST_STATES; ++k) rule.stay[k] = static_cast<Real>(values[8 + k]);
    const long G = rule.gates(), H = w[2] / G, S = h_[2];
    const bool norm_known = rule.lstm() || rule.family == Family::kGru || rule.family == Family::kGruBefore;
    if (w[2] % G || rule.heads < 1 || H < 1 || H % rule.heads || (S != H && !rule.projected) || S < 1 ||
        (rule.projected && !rule.lstm()) || (rule.norm && !norm_known) ||
        (rule.heads > 1 && rule.family != Family::kSlstm))
      return wrong;
    all.outputs = S;
    directions = directions_, pattern = pattern_, M = members, first = x[1], second = x[2];
    all.n = Sizes{batch_major ? x[2] : x[1], batch_major ? x[1] : x[2], x[3], H, false, batch_major};
    return ffi::Error::Success();
  }

  void take(Arrays& arrays) {
    const Rule& rule = all.rule;
    const long T = all.n.steps, B = all.n.rows, D = all.n.inputs, H = all.n.units, S = all.outputs, E = all.extra() * H;
    xs = arrays.floats("xs", {first, second, D});
    w_x = arrays.floats("w_x", {D, rule.gates() * H});
    h = arrays.floats("h", {B, S});
    rest = arrays.floats("rest", {B, E});
    fresh_h = arrays.floats("fresh_h", {B, S});
    fresh_rest = arrays.floats("fresh_rest", {B, E});
    valid = arrays.flags("valid", {first, second});
    start = arrays.flags("start", {first, second});
    mask = arrays.floats("mask", {B, S});
    stay_h = arrays.flags("stay_h", {first, second, S});
    stay_rest = arrays.flags("stay_rest", {first, second, E});
    w_h = arrays.floats("w_h", {S, (rule.first() + rule.reset_before()) * H});
    w_2 = arrays.floats("w_2", {H, S});
    theta = arrays.floats("theta", {rule.theta(), H});
    const bool rows = M * B != 0, steps = rows && T != 0, fresh = steps && start.first != nullptr;
    arrays.need("xs", xs, steps && D != 0);
    arrays.need("w_x", w_x, D != 0);
    arrays.need("w_h", w_h, rule.first() != 0);
    arrays.need("w_2", w_2, rule.projected);
    arrays.need("theta", theta, rule.theta() != 0);
    arrays.need("h", h, rows);
    arrays.need("rest", rest, rows && E != 0);
    arrays.need("fresh_h", fresh_h, fresh);
    arrays.need("fresh_rest", fresh_rest, fresh && E != 0);
    arrays.need("stay_rest", stay_rest, stay_h.first != nullptr && E != 0);
  }

  StagedInputs of(long m) const {
    StagedInputs p = all;
    p.n.reverse = (directions >> (m % pattern)) & 1;
    p.xs = xs[m], p.w_x = w_x[m], p.w_h = w_h[m], p.w_2 = w_2[m], p.theta = theta[m];
    p.h = h[m], p.rest = rest[m], p.fresh_h = fresh_h[m], p.fresh_rest = fresh_rest[m];
    p.valid = valid[m], p.start = start[m], p.mask = mask[m], p.stay_h = stay_h[m], p.stay_rest = stay_rest[m];
    return p;
  }
  long weights() const { return all.outputs * all.rule.first() * all.n.units; }
};

ffi::Error staged_forward(ffi::Span<const int64_t> numbers, ffi::Span<const double> values, bool batch_major,
                          int64_t directions, int64_t pattern, int64_t members, int64_t here, ffi::RemainingArgs arguments,
                          ffi::RemainingRets results) {
  Arrays arrays(arguments, results, members, here);
  Call q;
  if (ffi::Error error = q.read(arrays, numbers, values, batch_major, directions, pattern, members); error.failure())
    return error;
  q.take(arrays);
  const Rule& rule = q.all.rule;
  const long B = q.all.n.rows, H = q.all.n.units, S = q.all.outputs, E = q.all.extra() * H;
  const auto b = arrays.floats("b", {rule.gates() * H});
  const auto ys = arrays.result("ys", {q.first, q.second, S});
  const auto last_h = arrays.result("last_h", {B, S}), last_rest = arrays.result("last_rest", {B, E});
  const auto kept = arrays.result("kept", {q.first, q.second, rule.kept(H)});
  const auto rests = arrays.result("rests", {q.first, q.second, E});
  const bool rows = q.M * B != 0;
  arrays.need("ys", ys, rows && q.all.n.steps != 0);
  arrays.need("last_h", last_h, rows);
  arrays.need("last_rest", last_rest, rows && E != 0);
  if (ffi::Error error = arrays.error(); error.failure()) return error;
  if (!rows) return ffi::Error::Success();
  return each_member(q.M, q.weights(), [&](long m, int threads) {
    StagedForward p{};
    static_cast<StagedInputs&>(p) = q.of(m);
    p.b = b[m], p.ys = ys[m], p.last_h = last_h[m], p.last_rest = last_rest[m], p.kept = kept[m], p.rests = rests[m];
    staged(p, threads);
  });
}

ffi::Error staged_cotangents(ffi::Span<const int64_t> numbers, ffi::Span<const double> values, bool batch_major,
                             int64_t directions, int64_t pattern, int64_t members, int64_t here,
                             ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  Arrays arrays(arguments, results, members, here);
  Call q;
  if (ffi::Error error = q.read(arrays, numbers, values, batch_major, directions, pattern, members); error.failure())
    return error;
  q.take(arrays);
  const Rule& rule = q.all.rule;
  const long B = q.all.n.rows, D = q.all.n.inputs, H = q.all.n.units, S = q.all.outputs, E = q.all.extra() * H;
  const long G = rule.gates() * H, F = (rule.first() + rule.reset_before()) * H, K = rule.theta();
  const auto ys = arrays.floats("ys", {q.first, q.second, S});
  const auto kept = arrays.floats("kept", {q.first, q.second, rule.kept(H)});
  const auto rests = arrays.floats("rests", {q.first, q.second, E}), d_ys = arrays.floats("d_ys", {q.first, q.second, S});
  const auto d_last_h = arrays.floats("d_last_h", {B, S}), d_last_rest = arrays.floats("d_last_rest", {B, E});
  const auto d_xs = arrays.result("d_xs", {q.first, q.second, D});
  const auto d_h = arrays.result("d_h", {B, S}), d_rest = arrays.result("d_rest", {B, E});
  const auto d_fresh_h = arrays.result("d_fresh_h", {B, S}), d_fresh_rest = arrays.result("d_fresh_rest", {B, E});
  const auto d_w_x = arrays.result("d_w_x", {D, G}), d_w_h = arrays.result("d_w_h", {S, F});
  const auto d_w_2 = arrays.result("d_w_2", {H, S}), d_theta = arrays.result("d_theta", {K, H});
  const auto d_b = arrays.result("d_b", {G});
  const bool rows = q.M * B != 0, steps = rows && q.all.n.steps != 0, fresh = steps && q.start.first != nullptr;
  arrays.need("ys", ys, steps);
  arrays.need("kept", kept, steps);
  arrays.need("rests", rests, steps && E != 0);
  arrays.need("d_ys", d_ys, steps);
  arrays.need("d_last_h", d_last_h, rows);
  arrays.need("d_last_rest", d_last_rest, rows && E != 0);
  arrays.need("d_h", d_h, rows);
  arrays.need("d_rest", d_rest, rows && E != 0);
  arrays.need("d_fresh_h", d_fresh_h, fresh);
  arrays.need("d_fresh_rest", d_fresh_rest, fresh && E != 0);
  const bool weights = d_w_x.first || d_w_h.first;  // all of them, or none
  arrays.need("d_w_x", d_w_x, weights && D != 0);
  arrays.need("d_w_h", d_w_h, weights && F != 0);
  arrays.need("d_w_2", d_w_2, weights && rule.projected);
  arrays.need("d_theta", d_theta, weights && K != 0);
  if (ffi::Error error = arrays.error(); error.failure()) return error;
  if (!rows) {  // nothing is summed
    for (const auto& [array, size] : {std::pair(d_w_x, D * G), {d_w_h, S * F}, {d_w_2, H * S}, {d_theta, K * H}, {d_b, G}})
      if (array.first) std::memset(array.first, 0, q.M * size * sizeof(Real));
    return ffi::Error::Success();
  }
  return each_member(q.M, q.weights(), [&](long m, int threads) {
    StagedBackward p{};
    static_cast<StagedInputs&>(p) = q.of(m);
    p.ys = ys[m], p.kept = kept[m], p.rests = rests[m];
    p.d_ys = d_ys[m], p.d_last_h = d_last_h[m], p.d_last_rest = d_last_rest[m];
    p.weights = weights;
    p.d_xs = d_xs[m], p.d_w_x = d_w_x[m], p.d_w_h = d_w_h[m], p.d_w_2 = d_w_2[m], p.d_theta = d_theta[m], p.d_b = d_b[m];
    p.d_h = d_h[m], p.d_rest = d_rest[m], p.d_fresh_h = d_fresh_h[m], p.d_fresh_rest = d_fresh_rest[m];
    staged_backward(p, threads);
  });
}

}  // namespace

#define STAGED_CALL                              \
  ffi::Ffi::Bind()                             \
      .Attr<ffi::Span<const int64_t>>("numbers") \
      .Attr<ffi::Span<const double>>("values")  \
      .Attr<bool>("batch_major")                    \
      .Attr<int64_t>("directions")                  \
      .Attr<int64_t>("pattern")                     \
      .Attr<int64_t>("members")                     \
      .Attr<int64_t>("here")                        \
      .RemainingArgs()                              \
      .RemainingRets()

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_staged_forward), staged_forward, STAGED_CALL);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_staged_backward), staged_cotangents, STAGED_CALL);
#pragma GCC visibility pop

}  // namespace jaxrnn::JAXRNN_NUMBERS
