// The kernels as targets of the XLA FFI. Every shape is checked here, before a pointer is used.

#include <string>

#include "problem.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxrnn {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Flags = ffi::Buffer<ffi::PRED>;
using Result = ffi::Result<Floats>;

namespace {

// Shapes that were not as they must be, the first of them by name.
class Shapes {
 public:
  template <class B>
  auto* data(const char* name, B& buffer, std::initializer_list<long> shape, bool optional = false) {
    auto dimensions = buffer.dimensions();
    if (optional && buffer.element_count() == 0) return static_cast<decltype(buffer.typed_data())>(nullptr);
    bool equal = dimensions.size() == shape.size();
    size_t k = 0;
    for (long size : shape) equal = equal && dimensions[k++] == size;
    if (!equal && error_.empty()) error_ = std::string(name) + ": expected another shape";
    return buffer.typed_data();
  }
  ffi::Error error() const {
    return error_.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument("jaxrnn: " + error_);
  }

 private:
  std::string error_;
};

template <class P>
P* at(P* p, long member, long size) {
  return p ? p + member * size : nullptr;
}

// Work on every member: many members one for each thread, few ones with all threads in each.
template <class Work>
void each_member(long members, const Work& work) {
  const int threads = Pool::threads();
  const int parts = members < threads ? 1 : threads;
  const std::function<void(int)> part = [&](int k) {
    for (long m = members * k / parts; m < members * (k + 1) / parts; ++m) work(m, parts == 1 ? threads : 1);
  };
  if (parts == 1 || !Pool::run(parts, part))
    for (long m = 0; m < members; ++m) work(m, parts == 1 ? threads : 1);
}

bool known(int64_t kind) { return kind >= 0 && kind <= static_cast<int64_t>(Kind::kGruBefore); }

ffi::Error forward(int64_t kind_number, bool reverse, Floats xs, Floats w_x, Floats b, Floats w_h, Floats b_hn, Floats h,
                   Floats c, Floats fresh_h, Floats fresh_c, Flags valid, Flags start, Result ys, Result last_h,
                   Result last_c, Result kept, Result s, Result c_before) {
  if (!known(kind_number) || xs.dimensions().size() != 4 || w_h.dimensions().size() != 3)
    return ffi::Error::InvalidArgument("jaxrnn: unknown kind, or xs or w_h of another rank");
  const Kind kind = static_cast<Kind>(kind_number);
  const auto x = xs.dimensions();
  const Sizes n{x[0], x[1], x[2], x[3], w_h.dimensions()[1]};
  const long M = n.members, T = n.steps, B = n.rows, D = n.inputs, H = n.units, G = gates_of(kind) * H;
  const bool lstm = kind == Kind::kLstm;
  Shapes shapes;
  Forward p{};
  p.xs = xs.typed_data();
  p.w_x = shapes.data("w_x", w_x, {M, D, G});
  p.b = shapes.data("b", b, {M, G}, true);
  p.w_h = shapes.data("w_h", w_h, {M, H, G});
  p.b_hn = shapes.data("b_hn", b_hn, {M, H}, true);
  p.h = shapes.data("h", h, {M, B, H});
  p.c = shapes.data("c", c, {M, B, lstm ? H : 0}, !lstm);
  p.fresh_h = shapes.data("fresh_h", fresh_h, {M, B, H}, start.element_count() == 0);
  p.fresh_c = shapes.data("fresh_c", fresh_c, {M, B, lstm ? H : 0}, !lstm || start.element_count() == 0);
  p.valid = reinterpret_cast<const uint8_t*>(shapes.data("valid", valid, {M, T, B}, true));
  p.start = reinterpret_cast<const uint8_t*>(shapes.data("start", start, {M, T, B}, true));
  p.ys = shapes.data("ys", *ys, {M, T, B, H});
  p.last_h = shapes.data("last_h", *last_h, {M, B, H});
  p.last_c = shapes.data("last_c", *last_c, {M, B, lstm ? H : 0}, !lstm);
  const long K = kept_of(kind) * H;
  p.kept = shapes.data("kept", *kept, {M, T, B, K}, true);
  p.s = shapes.data("s", *s, {M, T, B, H}, true);
  p.c_before = shapes.data("c_before", *c_before, {M, T, B, H}, true);
  if (ffi::Error error = shapes.error(); error.failure()) return error;
  if (M == 0 || B == 0) return ffi::Error::Success();
  each_member(M, [&](long m, int threads) {
    Forward q = p;
    q.xs = at(p.xs, m, T * B * D), q.w_x = at(p.w_x, m, D * G), q.b = at(p.b, m, G), q.w_h = at(p.w_h, m, H * G);
    q.b_hn = at(p.b_hn, m, H), q.h = at(p.h, m, B * H), q.c = at(p.c, m, B * H);
    q.fresh_h = at(p.fresh_h, m, B * H), q.fresh_c = at(p.fresh_c, m, B * H);
    q.valid = at(p.valid, m, T * B), q.start = at(p.start, m, T * B), q.ys = at(p.ys, m, T * B * H);
    q.last_h = at(p.last_h, m, B * H), q.last_c = at(p.last_c, m, B * H), q.kept = at(p.kept, m, T * B * K);
    q.s = at(p.s, m, T * B * H), q.c_before = at(p.c_before, m, T * B * H);
    kernels().forward(kind, n, reverse, q, threads);
  });
  return ffi::Error::Success();
}

ffi::Error backward(int64_t kind_number, bool reverse, Floats w_h, Floats kept, Floats s, Floats c_before, Flags valid,
                    Flags start, Floats d_ys, Floats d_last_h, Floats d_last_c, Result d_u, Result d_v, Result d_h,
                    Result d_c, Result d_fresh_h, Result d_fresh_c) {
  if (!known(kind_number) || d_ys.dimensions().size() != 4)
    return ffi::Error::InvalidArgument("jaxrnn: unknown kind, or d_ys of another rank");
  const Kind kind = static_cast<Kind>(kind_number);
  const auto y = d_ys.dimensions();
  const Sizes n{y[0], y[1], y[2], 0, y[3]};
  const long M = n.members, T = n.steps, B = n.rows, H = n.units, G = gates_of(kind) * H, K = kept_of(kind) * H;
  const bool lstm = kind == Kind::kLstm, gru = kind == Kind::kGru || kind == Kind::kGruBefore;
  Shapes shapes;
  Backward p{};
  p.w_h = shapes.data("w_h", w_h, {M, H, G});
  p.kept = shapes.data("kept", kept, {M, T, B, K});
  p.s = shapes.data("s", s, {M, T, B, H}, !gru);
  p.c_before = shapes.data("c_before", c_before, {M, T, B, lstm ? H : 0}, !lstm);
  p.valid = reinterpret_cast<const uint8_t*>(shapes.data("valid", valid, {M, T, B}, true));
  p.start = reinterpret_cast<const uint8_t*>(shapes.data("start", start, {M, T, B}, true));
  p.d_ys = d_ys.typed_data();
  p.d_last_h = shapes.data("d_last_h", d_last_h, {M, B, H});
  p.d_last_c = shapes.data("d_last_c", d_last_c, {M, B, lstm ? H : 0}, !lstm);
  p.d_u = shapes.data("d_u", *d_u, {M, T, B, G});
  p.d_v = shapes.data("d_v", *d_v, {M, T, B, kind == Kind::kGru ? G : 0}, kind != Kind::kGru);
  p.d_h = shapes.data("d_h", *d_h, {M, B, H});
  p.d_c = shapes.data("d_c", *d_c, {M, B, lstm ? H : 0}, !lstm);
  p.d_fresh_h = shapes.data("d_fresh_h", *d_fresh_h, {M, B, H});
  p.d_fresh_c = shapes.data("d_fresh_c", *d_fresh_c, {M, B, lstm ? H : 0}, !lstm);
  if (ffi::Error error = shapes.error(); error.failure()) return error;
  if (M == 0 || B == 0) return ffi::Error::Success();
  each_member(M, [&](long m, int threads) {
    Backward q = p;
    q.w_h = at(p.w_h, m, H * G), q.kept = at(p.kept, m, T * B * K), q.s = at(p.s, m, T * B * H);
    q.c_before = at(p.c_before, m, T * B * H), q.valid = at(p.valid, m, T * B), q.start = at(p.start, m, T * B);
    q.d_ys = at(p.d_ys, m, T * B * H), q.d_last_h = at(p.d_last_h, m, B * H), q.d_last_c = at(p.d_last_c, m, B * H);
    q.d_u = at(p.d_u, m, T * B * G), q.d_v = at(p.d_v, m, T * B * G), q.d_h = at(p.d_h, m, B * H);
    q.d_c = at(p.d_c, m, B * H), q.d_fresh_h = at(p.d_fresh_h, m, B * H), q.d_fresh_c = at(p.d_fresh_c, m, B * H);
    kernels().backward(kind, n, reverse, q, threads);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxrnn


XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxrnn_gated_forward, jaxrnn::forward,
                              xla::ffi::Ffi::Bind()
                                  .Attr<int64_t>("kind")
                                  .Attr<bool>("reverse")
                                  .Arg<jaxrnn::Floats>()  // xs
                                  .Arg<jaxrnn::Floats>()  // w_x
                                  .Arg<jaxrnn::Floats>()  // b
                                  .Arg<jaxrnn::Floats>()  // w_h
                                  .Arg<jaxrnn::Floats>()  // b_hn
                                  .Arg<jaxrnn::Floats>()  // h
                                  .Arg<jaxrnn::Floats>()  // c
                                  .Arg<jaxrnn::Floats>()  // fresh_h
                                  .Arg<jaxrnn::Floats>()  // fresh_c
                                  .Arg<jaxrnn::Flags>()   // valid
                                  .Arg<jaxrnn::Flags>()   // start
                                  .Ret<jaxrnn::Floats>()  // ys
                                  .Ret<jaxrnn::Floats>()  // last_h
                                  .Ret<jaxrnn::Floats>()  // last_c
                                  .Ret<jaxrnn::Floats>()  // kept
                                  .Ret<jaxrnn::Floats>()  // s
                                  .Ret<jaxrnn::Floats>()  // c_before
);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxrnn_gated_backward, jaxrnn::backward,
                              xla::ffi::Ffi::Bind()
                                  .Attr<int64_t>("kind")
                                  .Attr<bool>("reverse")
                                  .Arg<jaxrnn::Floats>()  // w_h
                                  .Arg<jaxrnn::Floats>()  // kept
                                  .Arg<jaxrnn::Floats>()  // s
                                  .Arg<jaxrnn::Floats>()  // c_before
                                  .Arg<jaxrnn::Flags>()   // valid
                                  .Arg<jaxrnn::Flags>()   // start
                                  .Arg<jaxrnn::Floats>()  // d_ys
                                  .Arg<jaxrnn::Floats>()  // d_last_h
                                  .Arg<jaxrnn::Floats>()  // d_last_c
                                  .Ret<jaxrnn::Floats>()  // d_u
                                  .Ret<jaxrnn::Floats>()  // d_v
                                  .Ret<jaxrnn::Floats>()  // d_h
                                  .Ret<jaxrnn::Floats>()  // d_c
                                  .Ret<jaxrnn::Floats>()  // d_fresh_h
                                  .Ret<jaxrnn::Floats>()  // d_fresh_c
);

#define JAXRNN_EXPORT extern "C" __attribute__((visibility("default")))
JAXRNN_EXPORT const char* jaxrnn_jaxlib() { return JAXRNN_JAXLIB; }  // whose headers this was compiled with
JAXRNN_EXPORT const char* jaxrnn_instructions() { return jaxrnn::kernels().name; }
JAXRNN_EXPORT int jaxrnn_threads() { return jaxrnn::Pool::threads(); }
