/* The backward of the matrix scan, in two kinds of units that share nothing:
 *
 * - a head: dv, backwards in time, rows K and lanes V (`matrix_values_unit`);
 * - a head and up to LANES keys: dq forwards, then dk and dlog_a backwards, rows V and lanes K
 *   (`matrix_keys_unit`). Heads of a group are added up HEADS at a time, in order, into `dq_part`
 *   and `dk_part`; the caller adds the parts, so that no sum depends on the number of threads.
 *
 * dlog_a_t = dlog_a_{t+1} + q_t dq_t - k_t dk_t (per head and key), from the last token backwards,
 * needs no state per token. It starts anew at every chunk from the states of both passes, so that
 * rounding adds up over CHUNK tokens at most. A token's gradient is 0 where its decay is 0. */
#ifndef SW_MATRIX_BACKWARD
#define SW_MATRIX_BACKWARD
#define HEADS 8
#endif
#define LANES (4 * WIDTH)

typedef struct {
    const STORE *q, *k, *v, *dout;
    const REAL *log_a, *S0, *dS_T;
    const uint8_t *reset;
    int64_t T, K, V, H, G, keys, q_token, k_token, v_token;
} NAME(matrix_head);

static void NAME(matrix_values_unit)(const NAME(matrix_head) *x, STORE *dv, REAL *dS0,
                                     REAL *space) {
    NAME(matrix_work) w = {0};
    int64_t K = x->K, V = x->V, step = x->H * V, decays = x->H * x->keys;
    NAME(matrix_layout)(&w, space, K, V, x->keys > 1 ? PER_ROW : PER_HEAD);
    NAME(matrix_load_state)(&w, x->dS_T, K, V, V, 1);
    for (int64_t end = x->T, n; end > 0; end -= n) {
        int64_t last = end - 1;
        n = last % CHUNK + 1;
        NAME(matrix_decays)(&w, x->log_a + end * decays, -decays, x->keys,
                            x->reset ? x->reset + end : NULL, -1, n, end == x->T);
        NAME(matrix_pack_rows)(&w, x->q + last * x->q_token, -x->q_token,
                               x->k + last * x->k_token, -x->k_token, K, n);
        NAME(matrix_pack_lanes)(&w, x->dout + last * step, -step, V, n);
        NAME(matrix_advance)(&w);
        NAME(matrix_unpack)(&w, dv + last * step, -step, V, n);
    }
    for (int64_t i = 0; i < K; i++) {
        REAL a = x->reset && x->reset[0] ? 0 : NAME(decay_of)(x->log_a[x->keys > 1 ? i : 0]);
        for (int64_t l = 0; l < V; l++)
            dS0[i * V + l] = a == 0 ? 0 : a * w.state[i * w.lanes + l];
    }
}

/* What the tokens of a chunk read is one head's part of dq: kept as q dq, added to the group's. */
CLONES static void NAME(matrix_take_dq)(NAME(matrix_work) *w, const NAME(matrix_head) *x,
                                        int64_t t, int64_t n, int64_t lanes, int first, REAL *dq,
                                        REAL *qdq) {
    for (int64_t j = 0; j < n; j++) {
        const REAL *out = w->out + j * w->lanes;
        const STORE *q = x->q + (t + j) * x->q_token;
        REAL *sum = dq + (t + j) * x->G * x->K, *kept = qdq + (t + j) * w->lanes;
        NAME(matrix_rescale)(w, j);
        for (int64_t l = 0; l < lanes; l++) {
            sum[l] = first ? out[l] : sum[l] + out[l];
            kept[l] = LOAD(q[l]) * out[l];
        }
    }
}

CLONES static void NAME(matrix_take_dk)(NAME(matrix_work) *w, const NAME(matrix_head) *x,
                                        int64_t last, int64_t n, int64_t lanes, int first,
                                        REAL *dk, const REAL *qdq, REAL *flow, REAL *dlog_a) {
    for (int64_t j = 0; j < n; j++) {
        int64_t t = last - j;
        const REAL *out = w->out + j * w->lanes, *log_a = x->log_a + t * x->H * x->keys;
        const STORE *k = x->k + t * x->k_token;
        REAL *sum = dk + t * x->G * x->K, *to = dlog_a + t * x->H * x->keys, total = 0;
        NAME(matrix_rescale)(w, j);
        for (int64_t l = 0; l < lanes; l++) {
            sum[l] = first ? out[l] : sum[l] + out[l];
            flow[l] += qdq[t * w->lanes + l] - LOAD(k[l]) * out[l];
        }
        if (x->reset && x->reset[t]) memset(flow, 0, lanes * sizeof(REAL));
        if (x->keys > 1) {
            for (int64_t l = 0; l < lanes; l++) to[l] = flow[l] = log_a[l] < EXP_MIN ? 0 : flow[l];
        } else {
            if (log_a[0] < EXP_MIN) memset(flow, 0, lanes * sizeof(REAL));
            for (int64_t l = 0; l < lanes; l++) total += flow[l];
            to[0] = total;
        }
    }
}

/* dlog_a of the token after the chunk: its decay times the product of both passes' states. */
CLONES static void NAME(matrix_flow)(NAME(matrix_work) *w, const REAL *state, REAL *flow) {
    memset(flow, 0, w->lanes * sizeof(REAL));
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t l = 0; l < w->lanes; l++)
            flow[l] += w->state[r * w->lanes + l] * state[r * w->lanes + l];
    for (int64_t l = 0; l < w->lanes; l++) {
        REAL a = w->enter[w->kind == PER_LANE ? l : 0];
        flow[l] = a == 0 ? 0 : flow[l] * a;
    }
}

/* Its work space: a state, one more per chunk of tokens, and one vector of lanes per token. */
FN int64_t NAME(matrix_keys_space)(NAME(matrix_work) *w, REAL *at, int64_t T, int64_t V,
                                   int64_t lanes, int kind) {
    int64_t rows = round_up(V, TILE), num = (T + CHUNK - 1) / CHUNK;
    lanes = round_up(lanes, WIDTH);
    return NAME(matrix_layout)(w, at, V, lanes, kind) + num * rows * lanes + T * lanes;
}

static void NAME(matrix_keys_unit)(const NAME(matrix_head) *x, int64_t lanes, int first, REAL *dq,
                                   REAL *dk, REAL *dlog_a, REAL *space) {
    NAME(matrix_work) w = {0};
    REAL flow[LANES];
    int kind = x->keys > 1 ? PER_LANE : PER_HEAD;
    int64_t V = x->V, step = x->H * V, decays = x->H * x->keys, count = x->keys > 1 ? lanes : 1;
    REAL *saved = space + NAME(matrix_layout)(&w, space, V, lanes, kind);
    int64_t size = w.rows * w.lanes;
    REAL *qdq = saved + (x->T + CHUNK - 1) / CHUNK * size;
    NAME(matrix_load_state)(&w, x->S0, V, lanes, 1, V);
    for (int64_t t = 0; t < x->T; t += CHUNK) {
        int64_t n = min_i64(CHUNK, x->T - t);
        NAME(matrix_decays)(&w, x->log_a + t * decays, decays, count,
                            x->reset ? x->reset + t : NULL, 1, n, 0);
        NAME(matrix_pack_rows)(&w, x->v + t * x->v_token, x->v_token, x->dout + t * step, step, V,
                               n);
        NAME(matrix_pack_lanes)(&w, x->k + t * x->k_token, x->k_token, lanes, n);
        NAME(matrix_advance)(&w);
        NAME(matrix_take_dq)(&w, x, t, n, lanes, first, dq, qdq);
        memcpy(saved + t / CHUNK * size, w.state, size * sizeof(REAL));
    }
    NAME(matrix_load_state)(&w, x->dS_T, V, lanes, 1, V);
    for (int64_t end = x->T, n; end > 0; end -= n) {
        int64_t last = end - 1;
        n = last % CHUNK + 1;
        NAME(matrix_decays)(&w, x->log_a + end * decays, -decays, count,
                            x->reset ? x->reset + end : NULL, -1, n, end == x->T);
        NAME(matrix_flow)(&w, saved + last / CHUNK * size, flow);
        NAME(matrix_pack_rows)(&w, x->dout + last * step, -step, x->v + last * x->v_token,
                               -x->v_token, V, n);
        NAME(matrix_pack_lanes)(&w, x->q + last * x->q_token, -x->q_token, lanes, n);
        NAME(matrix_advance)(&w);
        NAME(matrix_take_dk)(&w, x, last, n, lanes, first, dk, qdq, flow, dlog_a);
    }
}

FN NAME(matrix_head) NAME(matrix_select)(const matrix_sizes *z, const NAME(matrix_head) *all,
                                         int64_t b, int64_t h, int64_t key) {
    NAME(matrix_head) x = *all;
    int64_t u = b * z->H + h, g = h / (z->H / z->G), keys = z->keys > 1 ? key : 0;
    x.q += b * z->q_batch + g * z->K + key;
    x.k += b * z->k_batch + g * z->K + key;
    x.v += b * z->v_batch + h * z->V;
    x.dout += (b * z->T * z->H + h) * z->V;
    x.log_a += (b * z->T * z->H + h) * z->keys + keys;
    x.S0 += (u * z->K + key) * z->V;
    if (x.dS_T) x.dS_T += (u * z->K + key) * z->V;
    if (x.reset) x.reset += b * z->T;
    return x;
}

/* dq_part, dk_part (parts, B, T, G, K), a part for every HEADS heads of a group; dlog_a_part
 * (parts, B, T, H, 1) with one decay per head, a part for every LANES keys, else (B, T, H, K). */
EXPORT int NAME(sw_matrix_backward)(const STORE *q, const STORE *k, const STORE *v,
                                    const REAL *log_a, const REAL *S0, const uint8_t *reset,
                                    const STORE *dout, const REAL *dS_T, REAL *dq_part,
                                    REAL *dk_part, STORE *dv, REAL *dlog_a_part, REAL *dS0,
                                    const matrix_sizes *z, int threads) {
    int64_t B = z->B, T = z->T, G = z->G, H = z->H, K = z->K, V = z->V, keys = z->keys, R = H / G;
    int64_t by_heads = (R + HEADS - 1) / HEADS, by_keys = (K + LANES - 1) / LANES;
    NAME(matrix_work) w = {0};
    NAME(matrix_head) all = {q, k, v, dout, log_a, S0, dS_T, reset, T, K, V, H, G, keys,
                             z->q_token, z->k_token, z->v_token};
    int64_t each = NAME(matrix_layout)(&w, NULL, K, V, keys > 1 ? PER_ROW : PER_HEAD);
    int64_t other = NAME(matrix_keys_space)(&w, NULL, T, V, min_i64(K, LANES),
                                            keys > 1 ? PER_LANE : PER_HEAD);
    each = each > other ? each : other;
    threads = threads_for(B, T, H * K * V, threads);
    REAL *space = malloc(each * threads * sizeof(REAL) + 64), *at = align(space);
    if (!space) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned mode = flush_denormals();
        REAL *mine = at + each * thread_index();
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < B * G * by_heads * by_keys; u++) {
            int64_t key = u % by_keys * LANES, part = u / by_keys % by_heads;
            int64_t b = u / by_keys / by_heads / G, g = u / by_keys / by_heads % G;
            int64_t begin = part * HEADS, end = min_i64(R, begin + HEADS);
            int64_t sum = ((part * B + b) * T * G + g) * K + key;
            for (int64_t h = begin; h < end; h++) {
                int64_t at_h = g * R + h;
                NAME(matrix_head) x = NAME(matrix_select)(z, &all, b, at_h, key);
                int64_t decay = (b * T * H + at_h) * keys;
                decay += keys > 1 ? key : u % by_keys * B * T * H;
                NAME(matrix_keys_unit)(&x, min_i64(LANES, K - key), h == begin, dq_part + sum,
                                       dk_part + sum, dlog_a_part + decay, mine);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < B * H; u++) {
            NAME(matrix_head) x = NAME(matrix_select)(z, &all, u / H, u % H, 0);
            NAME(matrix_values_unit)(&x, dv + (u / H * T * H + u % H) * V, dS0 + u * K * V, mine);
        }
        restore_denormals(mode);
    }
    free(space);
    return 0;
}
#undef LANES
