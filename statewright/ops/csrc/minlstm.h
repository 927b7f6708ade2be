/* minLSTM, arXiv:2410.01201, appendix A (candidate c) and B (candidate g(c), `positive`):
 * h_t = keep h_{t-1} + write cand with keep = sigmoid(f), write = sigmoid(i), or, `normalize`,
 * both divided by their sum; each times a constant, `by_keep` and `by_write`, 1 in the paper.
 *
 * Normalised: with u = exp(-f), w = exp(-i), keep = (1 + w) / ((1 + u) + (1 + w)). Dividing
 * through by max(1, u, w) keeps the ratio right where u and w overflow together, and leaves two
 * exponentials: `ex` of the smaller pre-activation and `ey` of the other. */

typedef struct { REAL keep, write, cand, slope, df, di; } NAME(minlstm_gates);

/* df and di: the derivatives of keep by f and of write by i, and of keep by -i if normalised. */
FN NAME(minlstm_gates) NAME(minlstm_gate)(REAL f, REAL i, REAL c, int positive, int normalize) {
    NAME(minlstm_gates) out;
    REAL one = 1, ec = positive ? NAME(exp_neg_abs)(c) : 0, one_c = one + ec, high_c;
    if (normalize) {
        REAL x = f < i ? f : i, y = f < i ? i : f;
        REAL e = NAME(exp_neg_abs)(x), top = x < 0 ? one : e, unit = x < 0 ? e : one;
        REAL shifted = (x < 0 ? x : 0) - y;
        REAL ey = EXP(shifted);
        ey = shifted < EXP_MIN ? 0 : ey;
        REAL of_x = one + e, of_y = unit + ey, sum = of_x + of_y;
        REAL inverse = one / (sum * one_c), scale = inverse * one_c;
        REAL keep = of_y * scale, write = of_x * scale; /* where f is the smaller one */
        REAL dx = keep * scale * top, dy = write * scale * ey;
        high_c = inverse * sum;
        out.keep = f < i ? keep : write;
        out.write = f < i ? write : keep;
        out.df = f < i ? dx : dy;
        out.di = f < i ? dy : dx;
    } else {
        REAL ef = NAME(exp_neg_abs)(f), ei = NAME(exp_neg_abs)(i);
        REAL one_f = one + ef, one_i = one + ei, inverse = one / (one_f * one_i * one_c);
        REAL high_f = inverse * (one_i * one_c), high_i = inverse * (one_f * one_c);
        high_c = inverse * (one_f * one_i);
        out.keep = f >= 0 ? high_f : ef * high_f;
        out.write = i >= 0 ? high_i : ei * high_i;
        out.df = ef * high_f * high_f;
        out.di = ei * high_i * high_i;
    }
    REAL low_c = ec * high_c;
    out.cand = positive ? NAME(candidate)(c, low_c) : c;
    out.slope = positive && c < 0 ? low_c * high_c : one;
    return out;
}

ROW NAME(minlstm_forward_row)(const STORE *restrict f, const STORE *restrict i,
                              const STORE *restrict c, REAL *restrict s, STORE *restrict h,
                              int64_t n, REAL by_keep, REAL by_write, int positive, int normalize) {
    for (int64_t d = 0; d < n; d++) {
        NAME(minlstm_gates) g = NAME(minlstm_gate)(LOAD(f[d]), LOAD(i[d]), LOAD(c[d]), positive,
                                                   normalize);
        REAL y = by_keep * g.keep * s[d] + by_write * g.write * g.cand;
        s[d] = y;
        h[d] = PUT(y);
    }
}

ROW NAME(minlstm_backward_row)(const STORE *restrict f, const STORE *restrict i,
                               const STORE *restrict c, const STORE *restrict h_prev,
                               const STORE *restrict dh, REAL *restrict s, STORE *restrict df,
                               STORE *restrict di, STORE *restrict dc, int64_t n, REAL by_keep,
                               REAL by_write, int positive, int normalize) {
    for (int64_t d = 0; d < n; d++) {
        NAME(minlstm_gates) g = NAME(minlstm_gate)(LOAD(f[d]), LOAD(i[d]), LOAD(c[d]), positive,
                                                   normalize);
        REAL grad = LOAD(dh[d]) + s[d], prev = by_keep * LOAD(h_prev[d]);
        REAL cand = by_write * g.cand;
        s[d] = grad * by_keep * g.keep;
        dc[d] = PUT(grad * by_write * g.write * g.slope);
        df[d] = PUT(grad * g.df * (normalize ? prev - cand : prev));
        di[d] = PUT(grad * g.di * (normalize ? cand - prev : cand));
    }
}
