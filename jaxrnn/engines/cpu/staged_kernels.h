// The kernels of gated recurrences with options, for one instruction set.

#include "simd.h"
#include "team.h"
#include "tile.h"
#include "products.h"
#include "activations.h"
#include "families.h"
#include "staged.h"
#include "staged_forward.h"
#include "staged_backward.h"
