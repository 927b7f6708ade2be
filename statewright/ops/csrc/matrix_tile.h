/* One tile over all tokens of the chunk; `rows` and `vecs` are constants after inlining. Included
 * once per dtype and width of vector, see matrix.h. */
ROW TILE_OF(NAME(matrix_work) *w, int64_t row, int64_t lane, const int rows, const int vecs) {
    typedef VEC vec;
    const int64_t step = sizeof(vec) / sizeof(REAL);
    int64_t lanes = w->lanes;
    REAL *state = w->state + row * lanes + lane;
    const REAL *coef = w->coef + row / TILE * WEIGHTS + row % TILE;
    vec s[TILE][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int x = 0; x < vecs; x++) s[i][x] = *(const vec *)(state + i * lanes + x * step);
    for (int64_t g = 0;; g++) {
        const REAL *enter = w->enter + g * w->width;
        if (w->kind == PER_LANE) {
#pragma GCC unroll 2
            for (int x = 0; x < vecs; x++) {
                vec a = *(const vec *)(enter + lane + x * step);
                __typeof__(a == a) keep = a != 0;
#pragma GCC unroll 8
                for (int i = 0; i < rows; i++)
                    s[i][x] = (vec)(keep & (__typeof__(keep))(s[i][x] * a));
            }
        } else {
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                REAL a = w->kind == PER_ROW ? enter[row + i] : enter[0];
#pragma GCC unroll 2
                for (int x = 0; x < vecs; x++) {
                    if (a == 0) s[i][x] = (vec){0};
                    else s[i][x] *= a;
                }
            }
        }
        if (g == w->num) break;
        for (int64_t j = w->start[g]; j < w->start[g + 1]; j++) {
            const REAL *c = coef + j * 2 * TILE, *in = w->in + j * lanes + lane;
            REAL *out = w->out + j * lanes + lane;
            vec write[2], read[2]; /* the tile's own sum: shorter sums round less */
#pragma GCC unroll 2
            for (int x = 0; x < vecs; x++) write[x] = *(const vec *)(in + x * step);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
                for (int x = 0; x < vecs; x++) {
                    s[i][x] += write[x] * c[i];
                    read[x] = i ? read[x] + s[i][x] * c[TILE + i] : s[i][x] * c[TILE];
                }
#pragma GCC unroll 2
            for (int x = 0; x < vecs; x++) *(vec *)(out + x * step) += read[x];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int x = 0; x < vecs; x++) *(vec *)(state + i * lanes + x * step) = s[i][x];
}

#undef VEC
#undef TILE_OF
