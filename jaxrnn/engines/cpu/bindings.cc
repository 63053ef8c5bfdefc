// The targets of the XLA FFI, in one source: its headers take longer to compile than all of them.

#include "cell_steps_binding.h"
#include "diagonal_binding.h"
#include "elementwise_binding.h"
#include "gated_binding.h"
#include "linear_binding.h"
#include "matrix_binding.h"
#include "staged_binding.h"
