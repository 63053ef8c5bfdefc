// The kernels that JAXRNN_KERNELS includes, once for each instruction set, each time in a namespace of its own.

#define JAXRNN_WIDTH 16
#if defined(JAXRNN_CHOICE)
#pragma GCC push_options
#pragma GCC optimize("O1")  // for processors from before 2013: less to compile
#endif
namespace baseline {
#include JAXRNN_KERNELS
}  // namespace baseline
#undef JAXRNN_WIDTH

#if defined(JAXRNN_CHOICE)
#pragma GCC pop_options

#define JAXRNN_FMA  // which the compiler may not say of a part of a file
#define JAXRNN_WIDTH 32
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include JAXRNN_KERNELS
}  // namespace avx2
#undef JAXRNN_WIDTH
#pragma GCC pop_options

#define JAXRNN_WIDTH 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
namespace avx512 {
#include JAXRNN_KERNELS
}  // namespace avx512
#undef JAXRNN_WIDTH
#undef JAXRNN_FMA
#pragma GCC pop_options
#endif
