// The kernels of linear recurrences of single units, for one instruction set.

#include "simd.h"
#include "team.h"
#include "tile.h"
#include "units.h"
#include "elementwise.h"
