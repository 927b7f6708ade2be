/* The matrix scan with V = 1 and a decay per key (Mamba): heads are channels with K numbers each.
 *
 * Bound by reading log_a and by its exponentials. A unit is a block of channels of one group, with
 * about NUMBERS numbers of state. The backward keeps a state per CHUNK_V tokens and computes those
 * in between again; blocks add up dq and dk for themselves, and the caller adds the blocks. */
#ifndef SW_MATRIX_VECTOR
#define SW_MATRIX_VECTOR
#include <math.h>
#define NUMBERS 2048
#define CHUNK_V 32
FN int64_t channels_of(int64_t K) { return K < NUMBERS ? NUMBERS / K : 1; }
#endif

/* One channel, one token. `K` is a constant where it is common. */
ROW NAME(channel_forward)(const REAL *restrict log_a, const STORE *restrict q,
                          const STORE *restrict k, REAL v, REAL *restrict s, STORE *o, int64_t K) {
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < K; i++) {
        REAL x = log_a[i], y = v * LOAD(k[i]);
        REAL kept = EXP(x) * s[i] + y;
        y = x < EXP_MIN ? y : kept;
        s[i] = y;
        sum += y * LOAD(q[i]);
    }
    *o = PUT(sum);
}

CLONES static void NAME(channels_forward)(const REAL *log_a, const STORE *q, const STORE *k,
                                          const STORE *v, REAL *s, STORE *o, int64_t K,
                                          int64_t n) {
    for (int64_t h = 0; h < n; h++, log_a += K, s += K) {
        if (K == 16) NAME(channel_forward)(log_a, q, k, LOAD(v[h]), s, o + h, 16);
        else NAME(channel_forward)(log_a, q, k, LOAD(v[h]), s, o + h, K);
    }
}

/* The next state and the decays, both kept; a reset is a decay of 0. */
CLONES static void NAME(channels_again)(const REAL *restrict log_a, const STORE *restrict k,
                                        const STORE *restrict v, const REAL *restrict s,
                                        REAL *restrict next, REAL *restrict a, int reset,
                                        int64_t K, int64_t n) {
    const REAL lowest = reset ? (REAL)INFINITY : EXP_MIN;
    for (int64_t h = 0; h < n; h++, log_a += K, s += K, next += K, a += K) {
        REAL vh = LOAD(v[h]);
        for (int64_t i = 0; i < K; i++) {
            REAL x = log_a[i], y = vh * LOAD(k[i]), e = EXP(x);
            a[i] = x < lowest ? 0 : e;
            next[i] = x < lowest ? y : e * s[i] + y;
        }
    }
}

ROW NAME(channel_backward)(const STORE *restrict q, const STORE *restrict k, REAL v, REAL dout,
                           const REAL *restrict before, const REAL *restrict s,
                           const REAL *restrict a, REAL *restrict r, REAL *restrict dq,
                           REAL *restrict dk, REAL *restrict dlog_a, STORE *dv, int64_t K) {
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < K; i++) {
        REAL grad = r[i] + dout * LOAD(q[i]), kept = grad * a[i];
        sum += grad * LOAD(k[i]);
        dk[i] += grad * v;
        dq[i] += s[i] * dout;
        kept = a[i] == 0 ? 0 : kept;
        REAL da = kept * before[i];
        dlog_a[i] = a[i] == 0 ? 0 : da;
        r[i] = kept;
    }
    *dv = PUT(sum);
}

CLONES static void NAME(channels_backward)(const STORE *q, const STORE *k, const STORE *v,
                                           const STORE *dout, const REAL *before, const REAL *s,
                                           const REAL *a, REAL *r, REAL *dq, REAL *dk,
                                           REAL *dlog_a, STORE *dv, int64_t K, int64_t n) {
    for (int64_t h = 0, i = 0; h < n; h++, i += K) {
        REAL vh = LOAD(v[h]), dh = LOAD(dout[h]);
        if (K == 16)
            NAME(channel_backward)(q, k, vh, dh, before + i, s + i, a + i, r + i, dq, dk,
                                   dlog_a + i, dv + h, 16);
        else
            NAME(channel_backward)(q, k, vh, dh, before + i, s + i, a + i, r + i, dq, dk,
                                   dlog_a + i, dv + h, K);
    }
}

typedef struct {
    const STORE *q, *k, *v, *dout;
    const REAL *log_a;
    const uint8_t *reset;
    REAL *dq, *dk, *dlog_a, *state;
    STORE *o, *dv;
    int64_t n;
} NAME(channels);

/* Block u of all: (sequence, group, block of the group's channels). */
FN NAME(channels) NAME(channels_select)(const matrix_sizes *z, const NAME(channels) *all,
                                        int64_t u) {
    NAME(channels) x = *all;
    int64_t R = z->H / z->G, width = channels_of(z->K), blocks = (R + width - 1) / width;
    int64_t part = u % blocks, g = u / blocks % z->G, b = u / blocks / z->G;
    int64_t h = g * R + part * width, row = b * z->T * z->H + h;
    int64_t sum = ((part * z->B + b) * z->T * z->G + g) * z->K;
    x.n = min_i64(width, R - part * width);
    x.q += b * z->q_batch + g * z->K;
    x.k += b * z->k_batch + g * z->K;
    x.v += b * z->v_batch + h;
    x.log_a += row * z->K;
    x.state += (b * z->H + h) * z->K;
    if (x.reset) x.reset += b * z->T;
    if (x.o) x.o += row;
    if (!x.dout) return x;
    x.dout += row;
    x.dv += row;
    x.dq += sum;
    x.dk += sum;
    x.dlog_a += row * z->K;
    return x;
}

EXPORT int NAME(sw_vector_forward)(const STORE *q, const STORE *k, const STORE *v,
                                   const REAL *log_a, const REAL *S0, const uint8_t *reset,
                                   STORE *o, REAL *S_T, const matrix_sizes *z, int threads) {
    int64_t K = z->K, R = z->H / z->G, width = channels_of(K), blocks = (R + width - 1) / width;
    NAME(channels) all = {.q = q, .k = k, .v = v, .log_a = log_a, .reset = reset, .o = o,
                          .state = S_T};
    threads = threads_for(z->B, z->T, z->H * K, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < z->B * z->G * blocks; u++) {
        NAME(channels) x = NAME(channels_select)(z, &all, u);
        unsigned mode = flush_denormals();
        memcpy(x.state, S0 + (x.state - S_T), x.n * K * sizeof(REAL));
        for (int64_t t = 0; t < z->T; t++) {
            const REAL *log_a_t = x.log_a + t * z->H * K;
            if (t + AHEAD < z->T) prefetch(log_a_t + AHEAD * z->H * K, x.n * K * sizeof(REAL));
            if (x.reset && x.reset[t]) memset(x.state, 0, x.n * K * sizeof(REAL));
            NAME(channels_forward)(log_a_t, x.q + t * z->q_token, x.k + t * z->k_token,
                                   x.v + t * z->v_token, x.state, x.o + t * z->H, K, x.n);
        }
        restore_denormals(mode);
    }
    return 0;
}

/* States after every token of the chunk from t on, given the one before it in states[0]. */
FN int64_t NAME(channels_chunk)(const matrix_sizes *z, const NAME(channels) *x, int64_t t,
                                REAL *states, REAL *a, int64_t room) {
    int64_t K = z->K, n = min_i64(CHUNK_V, z->T - t);
    for (int64_t j = 0; j < n; j++) {
        const REAL *log_a = x->log_a + (t + j) * z->H * K;
        REAL *s = states + j * room;
        if (t + j + AHEAD < z->T) prefetch(log_a + AHEAD * z->H * K, x->n * K * sizeof(REAL));
        NAME(channels_again)(log_a, x->k + (t + j) * z->k_token, x->v + (t + j) * z->v_token, s,
                             s + room, a + j * room, x->reset && x->reset[t + j], K, x->n);
    }
    return n;
}

static void NAME(channels_backward_unit)(const matrix_sizes *z, const NAME(channels) *x,
                                         const REAL *S0, const REAL *dS_T, REAL *space) {
    int64_t T = z->T, K = z->K, H = z->H, size = x->n * K, room = channels_of(K) * K;
    REAL *states = space, *a = states + (CHUNK_V + 1) * room, *saved = a + CHUNK_V * room;
    REAL *r = x->state;
    if (dS_T) memcpy(r, dS_T, size * sizeof(REAL));
    else memset(r, 0, size * sizeof(REAL));
    memcpy(saved, S0, size * sizeof(REAL));
    for (int64_t t = 0; t + CHUNK_V < T; t += CHUNK_V, saved += room) {
        memcpy(states, saved, size * sizeof(REAL));
        NAME(channels_chunk)(z, x, t, states, a, room);
        memcpy(saved + room, states + CHUNK_V * room, size * sizeof(REAL));
    }
    for (int64_t t = (T - 1) / CHUNK_V * CHUNK_V; t >= 0; t -= CHUNK_V, saved -= room) {
        memcpy(states, saved, size * sizeof(REAL));
        int64_t n = NAME(channels_chunk)(z, x, t, states, a, room);
        for (int64_t j = n - 1; j >= 0; j--) {
            int64_t at = t + j;
            REAL *dq = x->dq + at * z->G * K, *dk = x->dk + at * z->G * K;
            memset(dq, 0, K * sizeof(REAL));
            memset(dk, 0, K * sizeof(REAL));
            NAME(channels_backward)(x->q + at * z->q_token, x->k + at * z->k_token,
                                    x->v + at * z->v_token, x->dout + at * H, states + j * room,
                                    states + (j + 1) * room, a + j * room, r, dq, dk,
                                    x->dlog_a + at * H * K, x->dv + at * H, K, x->n);
        }
    }
}

/* dq_part, dk_part (parts, B, T, G, K), a part for every block of a group's channels. */
EXPORT int NAME(sw_vector_backward)(const STORE *q, const STORE *k, const STORE *v,
                                    const REAL *log_a, const REAL *S0, const uint8_t *reset,
                                    const STORE *dout, const REAL *dS_T, REAL *dq_part,
                                    REAL *dk_part, STORE *dv, REAL *dlog_a, REAL *dS0,
                                    const matrix_sizes *z, int threads) {
    int64_t K = z->K, R = z->H / z->G, width = channels_of(K), blocks = (R + width - 1) / width;
    NAME(channels) all = {.q = q, .k = k, .v = v, .log_a = log_a, .reset = reset, .dout = dout,
                          .dq = dq_part, .dk = dk_part, .dv = dv, .dlog_a = dlog_a, .state = dS0};
    threads = threads_for(z->B, z->T, z->H * K, threads);
    int64_t chunks = (z->T + CHUNK_V - 1) / CHUNK_V, each = (2 * CHUNK_V + 1 + chunks) * width * K;
    each = round_up(each, WIDTH);
    REAL *space = malloc(each * threads * sizeof(REAL) + 64), *mine = align(space);
    if (!space) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < z->B * z->G * blocks; u++) {
        NAME(channels) x = NAME(channels_select)(z, &all, u);
        unsigned mode = flush_denormals();
        int64_t at = x.state - dS0;
        NAME(channels_backward_unit)(z, &x, S0 + at, dS_T ? dS_T + at : NULL,
                                     mine + each * thread_index());
        restore_denormals(mode);
    }
    free(space);
    return 0;
}
