/* Every kernel for the dtype that the macros name, which are then free for the next one. */
#include "scan.h"
#include "gated.h"
#include "matrix.h"

#undef NAME
#undef STORE
#undef REAL
#undef LOAD
#undef PUT
#undef EXP
#undef EXP_MIN
