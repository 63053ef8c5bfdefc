// Arrays of a call of the XLA FFI that has several members, the check of their shapes, and the members' threads.

#pragma once
#include <atomic>
#include <functional>
#include <initializer_list>
#include <new>
#include <string>

#include "memory.h"
#include "shapes.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxrnn::JAXRNN_NUMBERS {
namespace {

// An array of every member, or one for all of them; null where it is absent.
template <class P>
struct Members {
  P* first = nullptr;
  long step = 0;
  P* operator[](long member) const { return first ? first + member * step : nullptr; }
};

template <class B>
ffi::Span<const int64_t> dimensions(B& buffer) {
  return buffer.dimensions();
}
template <class B>
ffi::Span<const int64_t> dimensions(ffi::Result<B>& buffer) {
  return buffer->dimensions();
}
template <class B>
void* pointer(B& buffer) {
  return buffer.untyped_data();
}
template <class B>
void* pointer(ffi::Result<B>& buffer) {
  return buffer->untyped_data();
}

// The arrays of a call, one after another. Of those that are not as they must be it remembers the first.
class Arrays {
 public:
  // The lowest bits of `here` tell of every argument whether it is among those of the call; those from the 32nd on, of
  // every result.
  Arrays(ffi::RemainingArgs arguments, ffi::RemainingRets results, int64_t members, int64_t here)
      : arguments_(arguments), results_(results), members_(members), arguments_here_(static_cast<uint64_t>(here) & 0xffffffff),
        results_here_(static_cast<uint64_t>(here) >> 32) {}

  // Of one of the first arguments.
  bool shape(size_t number, size_t rank, long* sizes) const {
    const auto buffer = arguments_.get<ffi::AnyBuffer>(number);
    if (!buffer.has_value() || buffer->dimensions().size() != rank) return false;
    for (size_t k = 0; k < rank; ++k) sizes[k] = buffer->dimensions()[k];
    return true;
  }

  // The next argument or result: `shape` for every member, or, where it is absent, without elements.
  Members<const Real> floats(const char* name, std::initializer_list<long> shape) {
    if (!next(arguments_here_)) return {};
    return check<const Real>(name, arguments_.get<Floats>(argument_++), shape);
  }
  Members<const uint8_t> flags(const char* name, std::initializer_list<long> shape) {
    if (!next(arguments_here_)) return {};
    return check<const uint8_t>(name, arguments_.get<ffi::Buffer<ffi::PRED>>(argument_++), shape);
  }
  Members<Real> result(const char* name, std::initializer_list<long> shape) {
    if (!next(results_here_)) return {};
    const auto found = check<Real>(name, results_.get<Floats>(result_++), shape, false);
    if (found.first) in_large_pages(found.first, members_ * found.step * sizeof(Real));
    return found;
  }
  // That an array is there, if it has elements.
  template <class P>
  void need(const char* name, const Members<P>& array, bool needed) {
    if (needed && !array.first && error_.empty()) error_ = std::string(name) + " is absent";
  }

  ffi::Error error() {
    const bool all = argument_ == arguments_.size() && result_ == results_.size() && !arguments_here_ && !results_here_;
    if (error_.empty() && !all) error_ = "too many arrays";
    return error_.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument("jaxrnn: " + error_);
  }

 private:
  static bool next(uint64_t& here) {
    const bool first = here & 1;
    here >>= 1;
    return first;
  }

  template <class P, class B>
  Members<P> check(const char* name, B buffer, std::initializer_list<long> shape, bool may_be_shared = true) {
    if (!buffer.has_value()) {
      if (error_.empty()) error_ = std::string(name) + ": not there, or of another dtype";
      return {};
    }
    const auto found = dimensions(*buffer);
    long elements = 1, size = 1;
    for (long each : found) elements *= each;
    if (elements == 0) return {};
    bool equal = found.size() == shape.size() + 1 && (found[0] == members_ || (may_be_shared && found[0] == 1));
    size_t k = 1;
    for (long expected : shape) equal = equal && found[k++] == expected, size *= expected;
    if (!equal) {
      if (error_.empty()) error_ = std::string(name) + ": another shape than expected";
      return {};
    }
    return {static_cast<P*>(pointer(*buffer)), found[0] == members_ ? size : 0};
  }

  ffi::RemainingArgs arguments_;
  ffi::RemainingRets results_;
  size_t argument_ = 0, result_ = 0;
  const long members_;
  uint64_t arguments_here_, results_here_;
  std::string error_;
};

// Work on every member: one for each thread if there are many of them, and each with all threads if they are few, or so
// large that a thread's cache holds the recurrent weights only in part.
template <class Work>
ffi::Error each_member(long members, long weights, const Work& work) {
  const int threads = Pool::threads();
  const bool apart = members >= threads && weights <= 1 << 17;
  std::atomic<bool> exhausted{false};
  auto one = [&](long m, int threads) {
    try {
      work(m, threads);
    } catch (const std::bad_alloc&) {
      exhausted = true;
    }
  };
  const std::function<void(int)> part = [&](int k) {
    for (long m = members * k / threads; m < members * (k + 1) / threads; ++m) one(m, 1);
  };
  if (!apart || threads == 1 || !Pool::share(threads, part))
    for (long m = 0; m < members; ++m) one(m, apart ? 1 : threads);
  if (exhausted) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxrnn: there is no memory for the weights' copies");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxrnn::JAXRNN_NUMBERS
