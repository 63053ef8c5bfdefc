// Matrix recurrences as targets of the XLA FFI. Every shape is checked here, before a pointer is used.

#pragma once
#include <initializer_list>

#include "memory.h"
#include "problem.h"
#include "shapes.h"
#include "threads.h"

namespace jaxrnn::JAXRNN_NUMBERS {
namespace {

class Reader : public Shapes {
 public:
  // (T, R, 1 or G, ...).
  Shared shared(const char* name, const Floats& array, const MatrixProblem& p, long last) {
    if (array.element_count() == 0) return {nullptr, 1};
    const auto found = array.dimensions();
    const long heads = found.size() > 2 && found[2] == 1 ? 1 : p.heads;
    if (last == 0) is(name, array, {p.steps, p.rows, heads});
    else is(name, array, {p.steps, p.rows, heads, last});
    return {array.typed_data(), heads};
  }
};

struct Sequences {
  const Floats &q, &k, &v, &s, &log_decay, &beta, &u, &w;
  const Flags& start;
  const Floats& fresh;
};

MatrixProblem problem(Reader& read, const Sequences& x, bool reverse, int64_t chunk) {
  MatrixProblem p{};
  const auto value = x.v.dimensions(), state = x.s.dimensions();
  if (value.size() != 4 || state.size() != 4 || chunk < 1) return read.fail("v"), p;
  p.steps = value[0], p.rows = value[1], p.heads = value[2], p.values = value[3], p.keys = state[2];
  p.reverse = reverse, p.chunk = chunk;
  read.is("s", x.s, {p.rows, p.heads, p.keys, p.values});
  p.v = x.v.typed_data(), p.s = x.s.typed_data();
  p.q = read.shared("q", x.q, p, p.keys), p.k = read.shared("k", x.k, p, p.keys);
  p.u = read.shared("u", x.u, p, p.keys), p.w = read.shared("w", x.w, p, p.keys);
  p.decay_by_row = x.log_decay.dimensions().size() == 4;
  p.log_decay = read.shared("log_decay", x.log_decay, p, p.decay_by_row ? p.keys : 0);
  p.beta = read.shared("beta", x.beta, p, 0);
  p.start = reinterpret_cast<const uint8_t*>(read.optional("start", x.start, {p.steps, p.rows}));
  p.fresh = read.optional("fresh", x.fresh, {p.rows, p.heads, p.keys, p.values});
  if ((p.u.data == nullptr) != (p.w.data == nullptr) || (p.u.data && p.beta.data)) read.fail("u");
  return p;
}

ffi::Error matrix_forward(bool reverse, int64_t chunk, Floats q, Floats k, Floats v, Floats s, Floats log_decay, Floats beta,
                   Floats u, Floats w, Flags start, Floats fresh, Written ys, Written last, Written reads,
                   Written states) {
  Reader read;
  MatrixProblem p = problem(read, {q, k, v, s, log_decay, beta, u, w, start, fresh}, reverse, chunk);
  if (read.failed()) return read.error();
  read.is("ys", *ys, {p.steps, p.rows, p.heads, p.values});
  read.is("last", *last, {p.rows, p.heads, p.keys, p.values});
  p.ys = ys->typed_data(), p.last = last->typed_data();
  p.reads = read.optional("reads", *reads, {p.steps, p.rows, p.heads, p.values});
  p.states = read.optional("states", *states, {(p.steps + chunk - 1) / chunk, p.rows, p.heads, p.keys, p.values});
  if (read.failed()) return read.error();
  if (p.rows * p.heads * p.keys * p.values == 0) return ffi::Error::Success();
  for (Written each : {ys, reads, states}) in_large_pages(each->typed_data(), each->size_bytes());
  matrix(p, Pool::threads());
  return ffi::Error::Success();
}

ffi::Error matrix_cotangents(bool reverse, int64_t chunk, Floats q, Floats k, Floats v, Floats s, Floats log_decay, Floats beta,
                    Floats u, Floats w, Flags start, Floats fresh, Floats ys, Floats last, Floats reads, Floats states,
                    Floats d_ys, Floats d_last, Written d_q, Written d_k, Written d_v, Written d_s, Written d_log_decay,
                    Written d_beta, Written d_u, Written d_w, Written d_fresh) {
  Reader read;
  MatrixProblem p = problem(read, {q, k, v, s, log_decay, beta, u, w, start, fresh}, reverse, chunk);
  if (read.failed()) return read.error();
  const long T = p.steps, R = p.rows, G = p.heads, K = p.keys, V = p.values;
  const bool reader = p.beta.data || p.u.data;
  read.is("ys", ys, {T, R, G, V});
  read.is("last", last, {R, G, K, V});
  read.is("states", states, {(T + chunk - 1) / chunk, R, G, K, V});
  if (reader) read.is("reads", reads, {T, R, G, V});
  read.is("d_ys", d_ys, {T, R, G, V});
  read.is("d_last", d_last, {R, G, K, V});
  // The backward pass reads what the other one wrote.
  p.ys = ys.typed_data(), p.last = last.typed_data();
  p.reads = reads.typed_data(), p.states = states.typed_data();
  MatrixGradient g{};
  g.d_ys = d_ys.typed_data(), g.d_last = d_last.typed_data();
  read.is("d_q", *d_q, {T, R, G, K});
  read.is("d_k", *d_k, {T, R, G, K});
  read.is("d_v", *d_v, {T, R, G, V});
  read.is("d_s", *d_s, {R, G, K, V});
  g.d_q = d_q->typed_data(), g.d_k = d_k->typed_data(), g.d_v = d_v->typed_data(), g.d_s = d_s->typed_data();
  if (p.log_decay.data) {
    if (p.decay_by_row) read.is("d_log_decay", *d_log_decay, {T, R, G, K});
    else read.is("d_log_decay", *d_log_decay, {T, R, G});
    g.d_log_decay = d_log_decay->typed_data();
  }
  if (p.beta.data) read.is("d_beta", *d_beta, {T, R, G}), g.d_beta = d_beta->typed_data();
  if (p.u.data) {
    read.is("d_u", *d_u, {T, R, G, K});
    read.is("d_w", *d_w, {T, R, G, K});
    g.d_u = d_u->typed_data(), g.d_w = d_w->typed_data();
  }
  if (p.fresh) read.is("d_fresh", *d_fresh, {R, G, K, V}), g.d_fresh = d_fresh->typed_data();
  if (read.failed()) return read.error();
  if (R * G * K * V == 0) return ffi::Error::Success();
  for (Written each : {d_q, d_k, d_v, d_log_decay, d_u, d_w})
    in_large_pages(each->typed_data(), each->size_bytes());
  matrix_backward(p, g, Pool::threads());
  return ffi::Error::Success();
}

}  // namespace

#define MATRIX_CALL                                                                                        \
  ffi::Ffi::Bind().Attr<bool>("reverse").Attr<int64_t>("chunk") ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY \
      FLAGS ARRAY

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_matrix_forward), matrix_forward, MATRIX_CALL RESULT RESULT RESULT RESULT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_matrix_backward), matrix_cotangents,
                              MATRIX_CALL ARRAY ARRAY ARRAY ARRAY ARRAY ARRAY RESULT RESULT RESULT RESULT RESULT RESULT RESULT
                                  RESULT RESULT);
#pragma GCC visibility pop

}  // namespace jaxrnn::JAXRNN_NUMBERS
