// Arrays of a call of the XLA FFI, and the check of their shapes.

#pragma once
#include <initializer_list>
#include <string>

#include "numbers.h"
#include "xla/ffi/api/ffi.h"

namespace jaxrnn::JAXRNN_NUMBERS {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<sizeof(Real) == 8 ? ffi::F64 : ffi::F32>;
using Flags = ffi::Buffer<ffi::PRED>;
using Written = ffi::Result<Floats>;

#define ARRAY .Arg<Floats>()
#define FLAGS .Arg<Flags>()
#define RESULT .Ret<Floats>()

// What has no elements is absent. The first array that has another shape than expected is named.
class Shapes {
 public:
  template <class Array>
  auto is(const char* name, const Array& array, std::initializer_list<long> shape) -> decltype(array.typed_data()) {
    const auto found = array.dimensions();
    bool right = found.size() == shape.size();
    long k = 0;
    for (long size : shape) right = right && found[k++] == size;
    if (!right) fail(name);
    return array.typed_data();
  }
  template <class Array>
  auto optional(const char* name, const Array& array, std::initializer_list<long> shape) -> decltype(array.typed_data()) {
    return array.element_count() ? is(name, array, shape) : nullptr;
  }
  void fail(const char* name) { wrong_ = wrong_ ? wrong_ : name; }
  bool failed() const { return wrong_ != nullptr; }
  ffi::Error error() const {
    if (!wrong_) return ffi::Error::Success();
    return ffi::Error::InvalidArgument(std::string("jaxrnn: ") + wrong_ + ": another shape than expected");
  }

 private:
  const char* wrong_ = nullptr;
};

}  // namespace jaxrnn::JAXRNN_NUMBERS
