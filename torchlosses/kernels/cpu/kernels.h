// The losses, compiled once for each instruction set: run.h includes this file with NAMESPACE and
// BYTES, the width of a vector, defined.

#include "vectors.h"

#include "tiles.h"

#include "losses.h"

#include "segments.h"
