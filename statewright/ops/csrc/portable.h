/* What differs between compilers and machines: clones, threads, denormals, exp, bfloat16. */
#ifndef SW_PORTABLE_H
#define SW_PORTABLE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* One binary for every x86-64: the loader picks the widest clone the processor has. Clones need
 * ifunc, hence glibc; the x86-64-v3/v4 names need gcc 12. Elsewhere the base target is used. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef CLONES
#define CLONES
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Inlined by force: a row function left out of line would be compiled for the base target only. */
#define ROW static inline __attribute__((always_inline)) void
#define FN static inline __attribute__((always_inline))

/* Channels of one unit of work: the carried state (4 KiB in float32) stays in the L1 cache. */
#define BLOCK 1024
/* Below this many elements starting a second thread costs more than it saves. */
#define SMALL 16384

enum { MASKED = 1, RESET = 2 };

/* Rows are strided when a thread has only some of the channels, which hardware prefetchers follow
 * badly; asking for the rows a few tokens ahead is worth 10-20 % from memory. */
#define AHEAD 4
FN void prefetch(const void *row, size_t bytes) {
#if defined(__GNUC__)
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)row + i);
#else
    (void)row;
    (void)bytes;
#endif
}

FN int64_t min_i64(int64_t x, int64_t y) { return x < y ? x : y; }

/* Width of a channel block: as wide as BLOCK allows, narrower only to give every thread a unit;
 * a multiple of 16 so that two threads do not write to one cache line of float32. */
FN int64_t block_width(int64_t B, int64_t D, int threads) {
    int64_t num = (D + BLOCK - 1) / BLOCK;
    while (num * B < threads && D / (num + 1) >= 32) num++;
    int64_t width = (D + num - 1) / num;
    return min_i64((width + 15) / 16 * 16, BLOCK);
}

FN int threads_for(int64_t B, int64_t T, int64_t D, int threads) {
    return B * T * D < SMALL || threads < 1 ? 1 : threads;
}

/* A decaying state or gradient lingers in the denormals for thousands of tokens, each many times
 * slower; inside a kernel they are flushed to zero and the caller's mode is put back. */
#if defined(__SSE2__)
FN unsigned flush_denormals(void) {
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
}
FN void restore_denormals(unsigned mode) { _mm_setcsr(mode); }
#else
FN unsigned flush_denormals(void) { return 0; }
FN void restore_denormals(unsigned mode) { (void)mode; }
#endif

/* exp by 2^n * p(r): adding 1.5 * 2^23 rounds to the integer n (rintf does not vectorise on the
 * base target) and leaves n + 127 in the low bits, ready to be shifted into the exponent.
 * Valid for EXP_MIN <= x; above the largest float it gives inf; NaN stays NaN. */
#define EXP_MIN_F32 -87.336544f
FN float exp_f32(float x) {
    const float shift = 12582912.0f + 127.0f;
    x = x > 89.0f ? 89.0f : x;
    float m = x * 1.44269504f + shift;
    float n = m - shift;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &m, 4);
    bits <<= 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

#define EXP_MIN_F64 -708.396418532264
FN double exp_f64(double x) {
    const double shift = 6755399441055744.0 + 1023.0;
    x = x > 710.0 ? 710.0 : x;
    double m = x * 1.4426950408889634 + shift;
    double n = m - shift;
    double r = x - n * 6.93147180369123816490e-01;
    r = r - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    uint64_t bits;
    memcpy(&bits, &m, 8);
    bits <<= 52;
    double scale;
    memcpy(&scale, &bits, 8);
    return p * scale;
}

FN float bf16_load(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to nearest even; a NaN is kept apart, because the carry would turn it into a zero. */
FN uint16_t bf16_store(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

#define SAME(x) (x)

#endif
