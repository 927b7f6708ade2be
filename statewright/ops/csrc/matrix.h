/* S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, and what its gradient is made of.
 *
 * Everything is one pattern: a matrix of rows and lanes; per token, decay it, add the outer product
 * of a row vector (`write`) and a lane vector (`in`), then sum its rows with weights (`read`) into
 * a lane vector (`out`). The output has rows K and lanes V. Its gradients: dq reads S transposed;
 * dv and dk read the gradient of S, which has the same recurrence backwards in time.
 *
 * A tile of the matrix stays in registers for CHUNK tokens. Decays cost nothing there: within a
 * segment the tile holds S divided by the decay since the segment began, what is written is divided
 * by it and what is read multiplied. A segment ends before that decay falls below LOWEST, so
 * nothing overflows; a decay of 0 and a reset begin one as well. Included once per dtype. */
#ifndef SW_MATRIX
#define SW_MATRIX

#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define CHUNK 64
#define TILE 8
/* A tile's weights for a chunk; not a power of two, which would put all tiles in one cache set. */
#define WEIGHTS (2 * TILE * (CHUNK + 1))
#define LOWEST 1.52587890625e-05f /* 2^-16 */

/* What a decay varies over: nothing, the rows, or the lanes. */
enum { PER_HEAD, PER_ROW, PER_LANE };

/* Strides in elements; heads and channels of a token are contiguous. keys is 1 or K. */
typedef struct {
    int64_t B, T, G, H, K, V, keys;
    int64_t q_batch, q_token, k_batch, k_token, v_batch, v_token;
} matrix_sizes;

FN int thread_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

FN void *align(void *p) { return (void *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }
FN int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/* 32 registers of 64 bytes hold a tile of 8 rows and 2 vectors. Elsewhere it is 4 rows and 2
 * vectors of 32 bytes, because compilers split wider ones badly. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define WIDE __attribute__((target("arch=x86-64-v4")))
#define NARROW __attribute__((target_clones("arch=x86-64-v3", "default")))
#endif
#endif
#ifndef NARROW
#define NARROW
#endif
#endif

#define WIDTH ((int64_t)(64 / sizeof(REAL)))
typedef REAL NAME(vec64) __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));
typedef REAL NAME(vec32) __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));

/* The work space of one thread, for matrices of up to `rows` x `lanes`, both padded. */
typedef struct {
    REAL *state, *coef, *in, *out, *since, *enter;
    int64_t rows, lanes, width, num, start[CHUNK + 1];
    int kind;
} NAME(matrix_work);

/* Elements of a work space; with `at`, also lays it out. */
FN int64_t NAME(matrix_layout)(NAME(matrix_work) *w, REAL *at, int64_t rows, int64_t lanes,
                               int kind) {
    rows = round_up(rows, TILE);
    lanes = round_up(lanes, WIDTH);
    int64_t width = kind == PER_ROW ? rows : kind == PER_LANE ? lanes : 1;
    int64_t sizes[] = {rows * lanes, rows / TILE * WEIGHTS, CHUNK * lanes, CHUNK * lanes,
                       CHUNK * width, (CHUNK + 1) * width};
    if (at) {
        REAL **parts[] = {&w->state, &w->coef, &w->in, &w->out, &w->since, &w->enter};
        w->rows = rows;
        w->lanes = lanes;
        w->width = width;
        w->kind = kind;
        for (int i = 0; i < 6; i++) {
            *parts[i] = at;
            at += round_up(sizes[i], WIDTH);
        }
    }
    int64_t total = 0;
    for (int i = 0; i < 6; i++) total += round_up(sizes[i], WIDTH);
    return total;
}

FN REAL NAME(decay_of)(REAL log_a) {
    REAL a = EXP(log_a);
    return log_a < EXP_MIN ? 0 : a;
}

/* Decays of n tokens, `count` per token: since[j] the one since token j's segment began, enter[g]
 * the one into segment g, and after the last segment the one that brings S back to scale. */
CLONES static void NAME(matrix_decays)(NAME(matrix_work) *w, const REAL *log_a, int64_t step,
                                       int64_t count, const uint8_t *reset, int64_t reset_step,
                                       int64_t n, int first_is_one) {
    int64_t width = w->width;
    w->num = 0;
    for (int64_t j = 0; j < n; j++) {
        REAL *since = w->since + j * width;
        const REAL *x = log_a + j * step;
        int fresh = j == 0;
        if (!j && first_is_one) {
            for (int64_t i = 0; i < width; i++) since[i] = 1;
        } else if (reset && reset[j * reset_step]) {
            fresh = 1;
            memset(since, 0, width * sizeof(REAL));
        } else {
            for (int64_t i = 0; i < count; i++) since[i] = NAME(decay_of)(x[i]);
            for (int64_t i = count; i < width; i++) since[i] = 1;
        }
        if (j) {
            int low = 0;
            for (int64_t i = 0; i < width; i++) {
                since[i] *= since[i - width];
                low |= since[i] < LOWEST;
            }
            fresh |= low;
        }
        if (fresh) {
            memcpy(w->enter + w->num * width, since, width * sizeof(REAL));
            for (int64_t i = 0; i < width; i++) since[i] = 1;
            w->start[w->num++] = j;
        }
    }
    w->start[w->num] = n;
    memcpy(w->enter + w->num * width, w->since + (n - 1) * width, width * sizeof(REAL));
}

ROW NAME(matrix_pack_tile)(REAL *restrict coef, const STORE *restrict write,
                           const STORE *restrict read) {
    for (int i = 0; i < TILE; i++) coef[i] = LOAD(write[i]);
    for (int i = 0; i < TILE; i++) coef[TILE + i] = LOAD(read[i]);
}

ROW NAME(matrix_rescale_tile)(REAL *restrict coef, const REAL *restrict since) {
    for (int i = 0; i < TILE; i++) coef[i] /= since[i];
    for (int i = 0; i < TILE; i++) coef[TILE + i] *= since[i];
}

/* Row vectors of n tokens, tile by tile: TILE weights to write with, TILE to read with. */
CLONES static void NAME(matrix_pack_rows)(NAME(matrix_work) *w, const STORE *write,
                                          int64_t write_step, const STORE *read, int64_t read_step,
                                          int64_t rows, int64_t n) {
    int64_t whole = rows / TILE * TILE;
    for (int64_t j = 0; j < n; j++, write += write_step, read += read_step) {
        const REAL *since = w->since + j * w->width;
        REAL *coef = w->coef + j * 2 * TILE;
        if (j + AHEAD < n) {
            prefetch(write + AHEAD * write_step, rows * sizeof(STORE));
            prefetch(read + AHEAD * read_step, rows * sizeof(STORE));
        }
        for (int64_t row = 0; row < whole; row += TILE)
            NAME(matrix_pack_tile)(coef + row / TILE * WEIGHTS, write + row, read + row);
        if (whole < rows) {
            STORE ends[2][TILE] = {{0}};
            memcpy(ends[0], write + whole, (rows - whole) * sizeof(STORE));
            memcpy(ends[1], read + whole, (rows - whole) * sizeof(STORE));
            NAME(matrix_pack_tile)(coef + whole / TILE * WEIGHTS, ends[0], ends[1]);
        }
        for (int64_t row = 0; w->kind == PER_ROW && row < rows; row += TILE)
            NAME(matrix_rescale_tile)(coef + row / TILE * WEIGHTS, since + row);
    }
}

CLONES static void NAME(matrix_pack_lanes)(NAME(matrix_work) *w, const STORE *in, int64_t step,
                                           int64_t lanes, int64_t n) {
    memset(w->out, 0, n * w->lanes * sizeof(REAL));
    for (int64_t j = 0; j < n; j++, in += step) {
        REAL *row = w->in + j * w->lanes;
        const REAL *since = w->since + j * w->width;
        if (j + AHEAD < n) prefetch(in + AHEAD * step, lanes * sizeof(STORE));
        REAL inverse = w->kind == PER_HEAD ? 1 / since[0] : 1;
        for (int64_t l = 0; l < lanes; l++) row[l] = LOAD(in[l]) * inverse;
        for (int64_t l = lanes; l < w->lanes; l++) row[l] = 0;
        if (w->kind == PER_LANE)
            for (int64_t l = 0; l < w->lanes; l++) row[l] /= since[l];
    }
}

/* What was read of token j, back to scale, in place. */
ROW NAME(matrix_rescale)(NAME(matrix_work) *w, int64_t j) {
    REAL *out = w->out + j * w->lanes;
    const REAL *since = w->since + j * w->width;
    if (w->kind == PER_HEAD)
        for (int64_t l = 0; l < w->lanes; l++) out[l] *= since[0];
    if (w->kind == PER_LANE)
        for (int64_t l = 0; l < w->lanes; l++) out[l] *= since[l];
}

CLONES static void NAME(matrix_unpack)(NAME(matrix_work) *w, STORE *to, int64_t step,
                                       int64_t lanes, int64_t n) {
    for (int64_t j = 0; j < n; j++, to += step) {
        NAME(matrix_rescale)(w, j);
        for (int64_t l = 0; l < lanes; l++) to[l] = PUT(w->out[j * w->lanes + l]);
    }
}

#define VEC NAME(vec64)
#define TILE_OF NAME(matrix_tile_wide)
#include "matrix_tile.h"
#define VEC NAME(vec32)
#define TILE_OF NAME(matrix_tile_narrow)
#include "matrix_tile.h"

#ifdef WIDE
WIDE static void NAME(matrix_advance_wide)(NAME(matrix_work) *w) {
    int64_t lane = 0;
    for (; lane + 2 * WIDTH <= w->lanes; lane += 2 * WIDTH)
        for (int64_t row = 0; row < w->rows; row += TILE)
            NAME(matrix_tile_wide)(w, row, lane, TILE, 2);
    for (int64_t row = 0; lane < w->lanes && row < w->rows; row += TILE)
        NAME(matrix_tile_wide)(w, row, lane, TILE, 1);
}
#endif

NARROW static void NAME(matrix_advance_narrow)(NAME(matrix_work) *w) {
    for (int64_t lane = 0; lane < w->lanes; lane += WIDTH)
        for (int64_t row = 0; row < w->rows; row += TILE / 2)
            NAME(matrix_tile_narrow)(w, row, lane, TILE / 2, 2);
}

/* The chunk that was packed: the state goes on by its tokens, `out` is what they read. */
static void NAME(matrix_advance)(NAME(matrix_work) *w) {
#ifdef WIDE
    if (__builtin_cpu_supports("x86-64-v4")) {
        NAME(matrix_advance_wide)(w);
        return;
    }
#endif
    NAME(matrix_advance_narrow)(w);
}

/* Between (rows, lanes) of any strides in memory and the padded state; 0 without `from`. */
ROW NAME(matrix_load_state)(NAME(matrix_work) *w, const REAL *from, int64_t rows, int64_t lanes,
                            int64_t row_step, int64_t lane_step) {
    memset(w->state, 0, w->rows * w->lanes * sizeof(REAL));
    for (int64_t r = 0; from && r < rows; r++)
        for (int64_t l = 0; l < lanes; l++)
            w->state[r * w->lanes + l] = from[r * row_step + l * lane_step];
}

#include "matrix_forward.h"
#include "matrix_backward.h"
#include "matrix_vector.h"
#undef WIDTH
