// The numbers that kernels compute with. Every source is compiled once for each kind of them, into its own namespace.

#pragma once

#ifdef JAXRNN_FLOAT64
#define JAXRNN_NUMBERS float64
#define JAXRNN_TARGET(name) name##_float64
#else
#define JAXRNN_NUMBERS float32
#define JAXRNN_TARGET(name) name
#endif

namespace jaxrnn::JAXRNN_NUMBERS {

#ifdef JAXRNN_FLOAT64
using Real = double;
#else
using Real = float;
#endif

}  // namespace jaxrnn::JAXRNN_NUMBERS
