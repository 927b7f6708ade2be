/* h_t = exp(log_a_t) * h_{t-1} + b_t. Included once per dtype: STORE is the type in memory, REAL
 * the type of the arithmetic and of the carried state.
 *
 * The decay is recomputed from log_a in the backward, so that nothing but h is kept. Decays below
 * the smallest normal number count as zero and are selected, not multiplied: 0 * inf is NaN. */

ROW NAME(scan_forward_row)(const STORE *restrict log_a, const STORE *restrict b, REAL *restrict s,
                           STORE *restrict h, int64_t n) {
    for (int64_t d = 0; d < n; d++) {
        REAL x = LOAD(log_a[d]), y = LOAD(b[d]);
        REAL kept = EXP(x) * s[d] + y;
        y = x < EXP_MIN ? y : kept;
        s[d] = y;
        h[d] = PUT(y);
    }
}

ROW NAME(scan_backward_row)(const STORE *restrict log_a, const STORE *restrict h_prev,
                            const STORE *restrict dh, REAL *restrict s, STORE *restrict dlog_a,
                            STORE *restrict db, int64_t n) {
    for (int64_t d = 0; d < n; d++) {
        REAL x = LOAD(log_a[d]), g = LOAD(dh[d]) + s[d];
        REAL kept = EXP(x) * g;
        kept = x < EXP_MIN ? 0 : kept;
        REAL da = kept * LOAD(h_prev[d]);
        s[d] = kept;
        db[d] = PUT(g);
        dlog_a[d] = PUT(x < EXP_MIN ? 0 : da);
    }
}

CLONES static void NAME(scan_forward_unit)(const STORE *log_a, const STORE *b, const REAL *h0,
                                           const uint8_t *reset, STORE *h, REAL *h_T, int64_t T,
                                           int64_t D, int64_t n) {
    REAL s[BLOCK];
    size_t bytes = n * sizeof(STORE);
    memcpy(s, h0, n * sizeof(REAL));
    for (int64_t t = 0; t < T; t++) {
        const STORE *log_a_t = log_a + t * D, *b_t = b + t * D;
        if (t + AHEAD < T) {
            prefetch(log_a_t + AHEAD * D, bytes);
            prefetch(b_t + AHEAD * D, bytes);
        }
        if (reset && reset[t]) memset(s, 0, n * sizeof(REAL));
        NAME(scan_forward_row)(log_a_t, b_t, s, h + t * D, n);
    }
    memcpy(h_T, s, n * sizeof(REAL));
}

CLONES static void NAME(scan_backward_unit)(const STORE *log_a, const STORE *h, const REAL *h0,
                                            const uint8_t *reset, const STORE *dh,
                                            const REAL *dh_T, STORE *dlog_a, STORE *db, REAL *dh0,
                                            int64_t T, int64_t D, int64_t n) {
    REAL s[BLOCK];
    STORE first[BLOCK], zero[BLOCK];
    size_t bytes = n * sizeof(STORE);
    memset(zero, 0, n * sizeof(STORE));
    memset(s, 0, n * sizeof(REAL));
    if (dh_T) memcpy(s, dh_T, n * sizeof(REAL));
    for (int64_t d = 0; d < n; d++) first[d] = PUT(h0[d]);
    for (int64_t t = T - 1; t >= 0; t--) {
        int fresh = reset && reset[t];
        const STORE *h_prev = fresh ? zero : t ? h + (t - 1) * D : first;
        if (t > AHEAD) {
            prefetch(log_a + (t - AHEAD) * D, bytes);
            prefetch(h + (t - 1 - AHEAD) * D, bytes);
            if (dh) prefetch(dh + (t - AHEAD) * D, bytes);
        }
        NAME(scan_backward_row)(log_a + t * D, h_prev, dh ? dh + t * D : zero, s, dlog_a + t * D,
                                db + t * D, n);
        if (fresh) memset(s, 0, n * sizeof(REAL));
    }
    memcpy(dh0, s, n * sizeof(REAL));
}

EXPORT void NAME(sw_scan_forward)(const STORE *log_a, const STORE *b, const REAL *h0,
                                  const uint8_t *reset, STORE *h, REAL *h_T, int64_t B, int64_t T,
                                  int64_t D, int threads) {
    threads = threads_for(B, T, D, threads);
    int64_t width = block_width(B, D, threads), num = D ? (D + width - 1) / width : 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < B * num; u++) {
        int64_t row = u / num, d = u % num * width, at = row * T * D + d, s = row * D + d;
        unsigned mode = flush_denormals();
        NAME(scan_forward_unit)(log_a + at, b + at, h0 + s, reset ? reset + row * T : NULL, h + at,
                                h_T + s, T, D, min_i64(width, D - d));
        restore_denormals(mode);
    }
}

EXPORT void NAME(sw_scan_backward)(const STORE *log_a, const STORE *h, const REAL *h0,
                                   const uint8_t *reset, const STORE *dh, const REAL *dh_T,
                                   STORE *dlog_a, STORE *db, REAL *dh0, int64_t B, int64_t T,
                                   int64_t D, int threads) {
    threads = threads_for(B, T, D, threads);
    int64_t width = block_width(B, D, threads), num = D ? (D + width - 1) / width : 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < B * num; u++) {
        int64_t row = u / num, d = u % num * width, at = row * T * D + d, s = row * D + d;
        unsigned mode = flush_denormals();
        NAME(scan_backward_unit)(log_a + at, h + at, h0 + s, reset ? reset + row * T : NULL,
                                 dh ? dh + at : NULL, dh_T ? dh_T + s : NULL, dlog_a + at, db + at,
                                 dh0 + s, T, D, min_i64(width, D - d));
        restore_denormals(mode);
    }
}
