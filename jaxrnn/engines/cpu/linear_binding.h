// The linear recurrence as a target of the XLA FFI. Every shape is checked here, before a pointer is used.

#pragma once
#include "memory.h"
#include "problem.h"
#include "shapes.h"
#include "threads.h"

namespace jaxrnn::JAXRNN_NUMBERS {
namespace {

// a (T or 1, R), b (T, R), h (R,), cut (T or 1, a divisor of R) or without elements; hs (T, R), last (R,).
ffi::Error linear_scan(bool reverse, bool shifted, Floats a, Floats b, Floats h, ffi::Buffer<ffi::PRED> cut,
                       ffi::Result<Floats> hs, ffi::Result<Floats> last) {
  auto wrong = [](const char* name) {
    return ffi::Error::InvalidArgument(std::string("jaxrnn: ") + name + ": another shape than expected");
  };
  const auto sizes = b.dimensions();
  if (sizes.size() != 2) return wrong("b");
  const long T = sizes[0], R = sizes[1];
  auto is = [](const auto& found, long rows, long columns) {
    return found.size() == 2 && found[0] == rows && found[1] == columns;
  };
  auto row = [&](const auto& found) { return found.size() == 1 && found[0] == R; };
  if (!is(a.dimensions(), T, R) && !is(a.dimensions(), 1, R)) return wrong("a");
  if (!row(h.dimensions())) return wrong("h");
  if (!is(hs->dimensions(), T, R)) return wrong("hs");
  if (!row(last->dimensions())) return wrong("last");
  const auto flags = cut.dimensions();
  const bool some = cut.element_count() != 0;
  if (some && (flags.size() != 2 || (flags[0] != T && flags[0] != 1) || R % flags[1] != 0)) return wrong("cut");
  if (R == 0) return ffi::Error::Success();
  in_large_pages(hs->typed_data(), T * R * sizeof(Real));
  linear(LinearProblem{T, R, reverse, shifted, a.typed_data(), b.typed_data(), h.typed_data(), a.dimensions()[0],
                       some ? reinterpret_cast<const uint8_t*>(cut.typed_data()) : nullptr, some ? flags[0] : 0,
                       some ? flags[1] : 0, hs->typed_data(), last->typed_data()},
         Pool::threads());
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXRNN_TARGET(jaxrnn_linear_scan), linear_scan,
                              ffi::Ffi::Bind()
                                  .Attr<bool>("reverse")
                                  .Attr<bool>("shifted")
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
#pragma GCC visibility pop

}  // namespace jaxrnn::JAXRNN_NUMBERS
