/* minGRU and minLSTM from the output p of their projection: gates, candidate and scan in one pass,
 * so that no gate is ever written to memory; the backward computes them again from p.
 * Included once per dtype, see scan.h.
 *
 * Every exponential is exp(-|x|) <= 1: sigmoid(x) is 1 / (1 + e) or e / (1 + e) by the sign of x,
 * and 1 - sigmoid(x) the other one, exact where they vanish and never an overflow. Divisions are
 * the slowest step, so the denominators of a token (each in [1, 4]) share one. */

FN REAL NAME(exp_neg_abs)(REAL x) {
    REAL negative = x > 0 ? -x : x, e = EXP(negative);
    return negative < EXP_MIN ? 0 : e;
}

/* The candidate g(c) = c + 0.5 for c >= 0, sigmoid(c) below, given e / (1 + e) = sigmoid(-|c|). */
FN REAL NAME(candidate)(REAL c, REAL low) { return c >= 0 ? c + (REAL)0.5 : low; }

#include "mingru.h"
#include "minlstm.h"

/* The bits of `cell`. The choice is made once per row of up to BLOCK channels. */
#ifndef SW_CELLS
#define SW_CELLS
enum { POSITIVE = 1, NORMALIZE = 2, LSTM = 4 };
#define CHOOSE(cell, GRU_ROW, LSTM_ROW)                                                            \
    switch (cell) {                                                                                \
    case 0: GRU_ROW(0); break;                                                                     \
    case POSITIVE: GRU_ROW(1); break;                                                              \
    case LSTM: LSTM_ROW(0, 0); break;                                                              \
    case LSTM | POSITIVE: LSTM_ROW(1, 0); break;                                                   \
    case LSTM | NORMALIZE: LSTM_ROW(0, 1); break;                                                  \
    default: LSTM_ROW(1, 1);                                                                       \
    }
#endif

CLONES static void NAME(gated_forward_unit)(const STORE *p, const REAL *h0, const REAL *init,
                                            const uint8_t *flags, STORE *h, REAL *h_T, int64_t T,
                                            int64_t D, int64_t n, REAL decay, REAL write,
                                            int cell) {
    REAL s[BLOCK];
    int64_t parts = cell & LSTM ? 3 : 2;
    memcpy(s, h0, n * sizeof(REAL));
    for (int64_t t = 0; t < T; t++, p += parts * D, h += D) {
        int flag = flags ? flags[t] : 0;
        for (int64_t i = 0; i < parts && t + AHEAD < T; i++)
            prefetch(p + (AHEAD * parts + i) * D, n * sizeof(STORE));
        if (flag & RESET) {
            if (init) memcpy(s, init, n * sizeof(REAL));
            else memset(s, 0, n * sizeof(REAL));
        }
        if (flag & MASKED) {
            for (int64_t d = 0; d < n; d++) h[d] = PUT(s[d]);
        } else {
#define GRU_ROW(positive) NAME(mingru_forward_row)(p, p + D, s, h, n, decay, write, positive)
#define LSTM_ROW(positive, normalize)                                                              \
    NAME(minlstm_forward_row)(p, p + D, p + 2 * D, s, h, n, decay, write, positive, normalize)
            CHOOSE(cell, GRU_ROW, LSTM_ROW)
#undef GRU_ROW
#undef LSTM_ROW
        }
    }
    memcpy(h_T, s, n * sizeof(REAL));
}

CLONES static void NAME(gated_backward_unit)(const STORE *p, const STORE *h, const REAL *h0,
                                             const REAL *init, const uint8_t *flags,
                                             const STORE *dh, const REAL *dh_T, STORE *dp,
                                             REAL *dh0, REAL *dinit, int64_t T, int64_t D,
                                             int64_t n, REAL decay, REAL write, int cell) {
    REAL s[BLOCK];
    STORE first[BLOCK], fresh[BLOCK], zero[BLOCK];
    int64_t parts = cell & LSTM ? 3 : 2;
    memset(zero, 0, n * sizeof(STORE));
    memset(s, 0, n * sizeof(REAL));
    if (dh_T) memcpy(s, dh_T, n * sizeof(REAL));
    if (dinit) memset(dinit, 0, n * sizeof(REAL));
    for (int64_t d = 0; d < n; d++) first[d] = PUT(h0[d]);
    for (int64_t d = 0; d < n; d++) fresh[d] = PUT(init ? init[d] : 0);
    for (int64_t t = T - 1; t >= 0; t--) {
        int flag = flags ? flags[t] : 0;
        const STORE *pt = p + t * parts * D, *dht = dh ? dh + t * D : zero;
        const STORE *h_prev = flag & RESET ? fresh : t ? h + (t - 1) * D : first;
        STORE *dpt = dp + t * parts * D;
        if (t > AHEAD) {
            for (int64_t i = 0; i < parts; i++)
                prefetch(pt + (i - AHEAD * parts) * D, n * sizeof(STORE));
            prefetch(h + (t - 1 - AHEAD) * D, n * sizeof(STORE));
            if (dh) prefetch(dht - AHEAD * D, n * sizeof(STORE));
        }
        if (flag & MASKED) {
            for (int64_t i = 0; i < parts; i++) memset(dpt + i * D, 0, n * sizeof(STORE));
            for (int64_t d = 0; d < n; d++) s[d] += LOAD(dht[d]);
        } else {
#define GRU_ROW(positive)                                                                          \
    NAME(mingru_backward_row)(pt, pt + D, h_prev, dht, s, dpt, dpt + D, n, decay, write, positive)
#define LSTM_ROW(positive, normalize)                                                              \
    NAME(minlstm_backward_row)(pt, pt + D, pt + 2 * D, h_prev, dht, s, dpt, dpt + D, dpt + 2 * D,  \
                               n, decay, write, positive, normalize)
            CHOOSE(cell, GRU_ROW, LSTM_ROW)
#undef GRU_ROW
#undef LSTM_ROW
        }
        if (flag & RESET) {
            if (dinit) for (int64_t d = 0; d < n; d++) dinit[d] += s[d];
            memset(s, 0, n * sizeof(REAL));
        }
    }
    memcpy(dh0, s, n * sizeof(REAL));
}

EXPORT void NAME(sw_gated_forward)(const STORE *p, const REAL *h0, const REAL *init,
                                   const uint8_t *flags, STORE *h, REAL *h_T, int64_t B, int64_t T,
                                   int64_t D, double decay, double write, int cell,
                                   int threads) {
    threads = threads_for(B, T, D, threads);
    int64_t width = block_width(B, D, threads), num = D ? (D + width - 1) / width : 0;
    int64_t parts = cell & LSTM ? 3 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < B * num; u++) {
        int64_t row = u / num, d = u % num * width, s = row * D + d;
        unsigned mode = flush_denormals();
        NAME(gated_forward_unit)(p + row * T * parts * D + d, h0 + s, init ? init + d : NULL,
                                 flags ? flags + row * T : NULL, h + row * T * D + d, h_T + s, T,
                                 D, min_i64(width, D - d), decay, write, cell);
        restore_denormals(mode);
    }
}

/* dinit is (B, D), one row per sequence: summed by the caller, so that threads share nothing. */
EXPORT void NAME(sw_gated_backward)(const STORE *p, const STORE *h, const REAL *h0,
                                    const REAL *init, const uint8_t *flags, const STORE *dh,
                                    const REAL *dh_T, STORE *dp, REAL *dh0, REAL *dinit, int64_t B,
                                    int64_t T, int64_t D, double decay, double write, int cell,
                                    int threads) {
    threads = threads_for(B, T, D, threads);
    int64_t width = block_width(B, D, threads), num = D ? (D + width - 1) / width : 0;
    int64_t parts = cell & LSTM ? 3 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < B * num; u++) {
        int64_t row = u / num, d = u % num * width, s = row * D + d, at = row * T * D + d;
        int64_t wide = row * T * parts * D + d;
        unsigned mode = flush_denormals();
        NAME(gated_backward_unit)(p + wide, h + at, h0 + s, init ? init + d : NULL,
                                  flags ? flags + row * T : NULL, dh ? dh + at : NULL,
                                  dh_T ? dh_T + s : NULL, dp + wide, dh0 + s,
                                  dinit ? dinit + s : NULL, T, D, min_i64(width, D - d), decay,
                                  write, cell);
        restore_denormals(mode);
    }
}
