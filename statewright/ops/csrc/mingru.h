/* minGRU, arXiv:2410.01201, appendix A (candidate c) and B (candidate g(c), `positive`):
 * z = sigmoid(k), h_t = decay (1 - z) h_{t-1} + write z cand (decay and write are 1 in the paper). */

typedef struct { REAL z, keep, cand, slope; } NAME(mingru_gates);

FN NAME(mingru_gates) NAME(mingru_gate)(REAL k, REAL c, int positive) {
    NAME(mingru_gates) out;
    REAL ek = NAME(exp_neg_abs)(k), one = 1;
    REAL high, low_c = 0, high_c = 0;
    if (positive) {
        REAL ec = NAME(exp_neg_abs)(c), inverse = one / ((one + ek) * (one + ec));
        high = inverse * (one + ec);
        high_c = inverse * (one + ek);
        low_c = ec * high_c;
    } else {
        high = one / (one + ek);
    }
    REAL low = ek * high;
    out.z = k >= 0 ? high : low;
    out.keep = k >= 0 ? low : high;
    out.cand = positive ? NAME(candidate)(c, low_c) : c;
    out.slope = positive && c < 0 ? low_c * high_c : one;
    return out;
}

ROW NAME(mingru_forward_row)(const STORE *restrict k, const STORE *restrict c, REAL *restrict s,
                             STORE *restrict h, int64_t n, REAL decay, REAL write, int positive) {
    for (int64_t d = 0; d < n; d++) {
        NAME(mingru_gates) g = NAME(mingru_gate)(LOAD(k[d]), LOAD(c[d]), positive);
        REAL y = decay * g.keep * s[d] + write * g.z * g.cand;
        s[d] = y;
        h[d] = PUT(y);
    }
}

ROW NAME(mingru_backward_row)(const STORE *restrict k, const STORE *restrict c,
                              const STORE *restrict h_prev, const STORE *restrict dh,
                              REAL *restrict s, STORE *restrict dk, STORE *restrict dc, int64_t n,
                              REAL decay, REAL write, int positive) {
    for (int64_t d = 0; d < n; d++) {
        NAME(mingru_gates) g = NAME(mingru_gate)(LOAD(k[d]), LOAD(c[d]), positive);
        REAL grad = LOAD(dh[d]) + s[d], into = grad * g.z;
        s[d] = grad * decay * g.keep;
        dc[d] = PUT(into * write * g.slope);
        dk[d] = PUT(into * g.keep * (write * g.cand - decay * LOAD(h_prev[d])));
    }
}
