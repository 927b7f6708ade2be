/* The kernels, once per dtype. No torch and no Python header is included: the library is called
 * through ctypes with plain pointers, so one file serves every Python and every torch. */
#include "portable.h"

/* The digest of these sources; the loader compares it with the files it finds beside itself. */
#ifndef SW_DIGEST
#define SW_DIGEST "unknown"
#endif
EXPORT const char *sw_digest(void) { return SW_DIGEST; }

EXPORT int sw_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

#define NAME(name) name##_f32
#define STORE float
#define REAL float
#define LOAD SAME
#define PUT SAME
#define EXP exp_f32
#define EXP_MIN EXP_MIN_F32
#include "dtype.h"

#define NAME(name) name##_f64
#define STORE double
#define REAL double
#define LOAD SAME
#define PUT SAME
#define EXP exp_f64
#define EXP_MIN EXP_MIN_F64
#include "dtype.h"

#define NAME(name) name##_bf16
#define STORE uint16_t
#define REAL float
#define LOAD bf16_load
#define PUT bf16_store
#define EXP exp_f32
#define EXP_MIN EXP_MIN_F32
#include "dtype.h"
