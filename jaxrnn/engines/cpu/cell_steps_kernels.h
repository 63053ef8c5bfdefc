// The kernels of single steps, for one instruction set.

#include "simd.h"
#include "team.h"
#include "diagonal_step.h"
#if JAXRNN_WIDTH < 64
#include "columns.h"
#include "matrix_step.h"
#endif
