/* The forward of the matrix scan: rows K, lanes V; one unit of work is a head of a sequence. */

/* A single token: the state goes through the registers once, from S0 to S_T. */
CLONES static void NAME(matrix_step)(const matrix_sizes *z, const STORE *q, const STORE *k,
                                     const STORE *v, const REAL *log_a, const REAL *S0, int reset,
                                     STORE *o, REAL *S_T) {
    REAL acc[128], x[128];
    for (int64_t p = 0; p < z->V; p += 128) {
        int64_t n = min_i64(128, z->V - p);
        for (int64_t l = 0; l < n; l++) x[l] = LOAD(v[p + l]);
        memset(acc, 0, n * sizeof(REAL));
        REAL a = 0;
        for (int64_t i = 0; i < z->K; i++) {
            const REAL *from = S0 + i * z->V + p;
            REAL *to = S_T + i * z->V + p, write = LOAD(k[i]), read = LOAD(q[i]);
            if (!i || z->keys > 1) a = reset ? 0 : NAME(decay_of)(log_a[i]);
            for (int64_t l = 0; l < n; l++) {
                REAL kept = a == 0 ? 0 : a * from[l];
                REAL s = kept + write * x[l];
                to[l] = s;
                acc[l] += s * read;
            }
        }
        for (int64_t l = 0; l < n; l++) o[p + l] = PUT(acc[l]);
    }
}

static void NAME(matrix_forward_unit)(const matrix_sizes *z, const STORE *q, const STORE *k,
                                      const STORE *v, const REAL *log_a, const REAL *S0,
                                      const uint8_t *reset, STORE *o, REAL *S_T, REAL *space) {
    NAME(matrix_work) w = {0};
    int64_t H = z->H, K = z->K, V = z->V;
    NAME(matrix_layout)(&w, space, K, V, z->keys > 1 ? PER_ROW : PER_HEAD);
    NAME(matrix_load_state)(&w, S0, K, V, V, 1);
    for (int64_t t = 0; t < z->T; t += CHUNK) {
        int64_t n = min_i64(CHUNK, z->T - t);
        NAME(matrix_decays)(&w, log_a + t * H * z->keys, H * z->keys, z->keys,
                            reset ? reset + t : NULL, 1, n, 0);
        NAME(matrix_pack_rows)(&w, k + t * z->k_token, z->k_token, q + t * z->q_token, z->q_token,
                               K, n);
        NAME(matrix_pack_lanes)(&w, v + t * z->v_token, z->v_token, V, n);
        NAME(matrix_advance)(&w);
        NAME(matrix_unpack)(&w, o + t * H * V, H * V, V, n);
    }
    for (int64_t i = 0; i < K; i++)
        memcpy(S_T + i * V, w.state + i * w.lanes, V * sizeof(REAL));
}

/* 0, or 1 if there is not enough memory for the work spaces. */
EXPORT int NAME(sw_matrix_forward)(const STORE *q, const STORE *k, const STORE *v,
                                   const REAL *log_a, const REAL *S0, const uint8_t *reset,
                                   STORE *o, REAL *S_T, const matrix_sizes *z, int threads) {
    int64_t T = z->T, H = z->H, K = z->K, V = z->V, R = H / z->G, keys = z->keys;
    threads = threads_for(z->B, T, H * K * V, threads);
    NAME(matrix_work) w = {0};
    int64_t each = T > 1 ? NAME(matrix_layout)(&w, NULL, K, V, keys > 1 ? PER_ROW : PER_HEAD) : 0;
    REAL *space = each ? malloc(each * threads * sizeof(REAL) + 64) : NULL, *at = align(space);
    if (each && !space) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < z->B * H; u++) {
        int64_t b = u / H, h = u % H, g = h / R;
        const STORE *qu = q + b * z->q_batch + g * K, *ku = k + b * z->k_batch + g * K;
        const STORE *vu = v + b * z->v_batch + h * V;
        const REAL *xu = log_a + (b * T * H + h) * keys, *Su = S0 + u * K * V;
        const uint8_t *ru = reset ? reset + b * T : NULL;
        STORE *ou = o + (b * T * H + h) * V;
        unsigned mode = flush_denormals();
        if (T == 1)
            NAME(matrix_step)(z, qu, ku, vu, xu, Su, ru && *ru, ou, S_T + u * K * V);
        else
            NAME(matrix_forward_unit)(z, qu, ku, vu, xu, Su, ru, ou, S_T + u * K * V,
                                      at + each * thread_index());
        restore_denormals(mode);
    }
    free(space);
    return 0;
}
