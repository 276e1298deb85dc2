// st3-kernels-impl.h - what the kernels of all instruction sets share. Included by files that are compiled for one each.
//
// Nothing of the standard library's templates here, or the linker may choose such a file's copies of them for CPUs that lack
// its instructions; for the same reason all is in an anonymous namespace.
//
// An instruction set S has registers of LANES floats (S::F) or dwords (S::D). A dword is STEP elements of a row: a float, or a
// pair of BF16. A tile is up to ROWS rows by a panel: 2 LANES columns of the other matrix, their dwords side by side.
#pragma once

#include "st3-kernels.h"

#include <stdlib.h>
#include <string.h>

namespace {

constexpr int64_t DWORDS = 512;  // of a row that are packed at once: panels stay in L2
constexpr float   LOG2_E = 1.44269504f;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory of one thread that grows to the largest size asked for.
struct scratch {
    char * data = nullptr;
    size_t size = 0;

    ~scratch() { release(); }

    char * get(size_t n) {
        if (n > size) {
            release();
#ifdef _WIN32
            data = (char *) _aligned_malloc(up(n, 64), 64);
#else
            data = (char *) aligned_alloc(64, up(n, 64));
#endif
            size = data ? n : 0;
            if (!data) {
                GGML_ABORT("st3: no memory for the vision encoder");
            }
        }
        return data;
    }

    void release() {
#ifdef _WIN32
        _aligned_free(data);
#else
        free(data);
#endif
    }
};

template <typename S> struct kernels {
    using F    = typename S::F;
    using D    = typename S::D;
    using Elem = typename S::Elem;  // of rows, STEP of them a dword

    static constexpr int     LANES = S::LANES;
    static constexpr int     ROWS  = S::ROWS;
    static constexpr int     STEP  = sizeof(int32_t) / sizeof(Elem);
    static constexpr int64_t PANEL = 2 * LANES;

    // c[M][PANEL] (+)= a[M][n_dwords] panel[n_dwords][PANEL].
    template <int M>
    static void
    tile(const Elem * a, int64_t a_row, const int32_t * panel, int64_t n_dwords, float * c, int64_t c_row, bool add) {
        F lo[M], hi[M];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            lo[i] = add ? S::load(c + i * c_row) : S::set1(0.0f);
            hi[i] = add ? S::load(c + i * c_row + LANES) : S::set1(0.0f);
        }
        for (int64_t p = 0; p < n_dwords; ++p) {
            const D b0 = S::load_dwords(panel + p * PANEL);
            const D b1 = S::load_dwords(panel + p * PANEL + LANES);
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                const D x = S::broadcast(a + i * a_row + STEP * p);
                lo[i]     = S::dot(lo[i], x, b0);
                hi[i]     = S::dot(hi[i], x, b1);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            S::store(c + i * c_row, lo[i]);
            S::store(c + i * c_row + LANES, hi[i]);
        }
    }

    template <int M = ROWS>
    static void
    tile_of(int64_t rows, const Elem * a, int64_t a_row, const int32_t * panel, int64_t n_dwords, float * c,
            int64_t c_row, bool add) {
        if (rows == M) {
            tile<M>(a, a_row, panel, n_dwords, c, c_row, add);
        } else if constexpr (M > 1) {
            tile_of<M - 1>(rows, a, a_row, panel, n_dwords, c, c_row, add);
        }
    }

    // Splits n rows evenly into blocks of at most ROWS: the rows of the block that begins at i.
    static int64_t rows_at(int64_t i, int64_t n) {
        const int64_t blocks = (n - i + ROWS - 1) / ROWS;
        return (n - i + blocks - 1) / blocks;
    }

    // Rows n < n_end of w, elements k0 <= k < k1, to a panel of up(k1 - k0, LANES * STEP) / STEP dwords a column; zeros for
    // what is not there. floats: room for LANES rows of k1 - k0, if w is quantized.
    static void
    pack(const char * w, size_t w_row, ggml_type type, int64_t n, int64_t n_end, int64_t k0, int64_t k1,
         int32_t * panel, float * floats) {
        for (int half = 0; half < 2; ++half, n += LANES) {
            const int64_t n_rows = least(n_end - n, LANES);
            const char *  rows   = w + n * w_row;
            int64_t       shift  = 0;
            if (floats) {
                for (int i = 0; i < n_rows; ++i) {
                    ggml_get_type_traits(type)->to_float(
                            rows + i * w_row + ggml_row_size(type, k0), floats + i * (k1 - k0), k1 - k0);
                }
                rows  = (const char *) floats;
                shift = k0;
            }
            const size_t    row    = floats ? (k1 - k0) * sizeof(float) : w_row;
            const ggml_type loaded = floats ? GGML_TYPE_F32 : type;
            for (int64_t k = k0; k < k1; k += LANES * STEP) {
                D r[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) {
                    r[i] = S::load_row(i < n_rows ? rows + i * row : nullptr, loaded, k - shift, k1 - shift);
                }
                S::transpose(r);
                int32_t * to = panel + (k - k0) / STEP * PANEL + half * LANES;
#pragma GCC unroll 16
                for (int i = 0; i < LANES; ++i) {
                    S::store_dwords(to + i * PANEL, r[i]);
                }
            }
        }
    }

    static F activate(F x, st3_activation activation) {
        F exponent;
        switch (activation) {
            case ST3_ACTIVATION_GELU_QUICK: exponent = S::mul(x, S::set1(-1.702f * LOG2_E)); break;
            case ST3_ACTIVATION_GELU: {  // (1 + tanh(u)) / 2 == 1 / (1 + exp(-2 u))
                const F u = S::fmadd(S::mul(x, x), S::set1(0.044715f), S::set1(1.0f));
                exponent  = S::mul(S::mul(x, u), S::set1(-2 * 0.79788456f * LOG2_E));
                break;
            }
            default: return x;
        }
        return S::div(x, S::add(exp2(S::min(exponent, S::set1(126.0f))), S::set1(1.0f)));
    }

    static F exp2(F x) {  // x <= 127; relative error below 1e-6
        x         = S::max(x, S::set1(-126.0f));
        const F n = S::round(x);
        const F f = S::sub(x, n);
        F       s = S::set1(1.5403530e-4f);
        s         = S::fmadd(s, f, S::set1(1.3333558e-3f));
        s         = S::fmadd(s, f, S::set1(9.6181291e-3f));
        s         = S::fmadd(s, f, S::set1(5.5504109e-2f));
        s         = S::fmadd(s, f, S::set1(2.4022651e-1f));
        s         = S::fmadd(s, f, S::set1(6.9314718e-1f));
        s         = S::fmadd(s, f, S::set1(1.0f));
        return S::scale(s, n);
    }

    static void store(void * y, ggml_type type, int64_t i, F x, int64_t n) {
        if (type == GGML_TYPE_F32) {
            S::store_n((float *) y + i, x, n);
        } else {
            S::store_n((Elem *) y + i, x, n);
        }
    }

    static void multiply(const st3_product & p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
        static thread_local scratch memory;

        constexpr int64_t K = DWORDS * STEP;

        const bool    quantized = p.w_type != GGML_TYPE_F32 && p.w_type != GGML_TYPE_F16 && p.w_type != GGML_TYPE_BF16;
        const int64_t m         = m1 - m0;

        int32_t * panels = (int32_t *) memory.get(
                (DWORDS * ST3_COLUMNS + m * ST3_COLUMNS + (quantized ? LANES * K : 0)) * sizeof(float));
        float * sums   = (float *) (panels + DWORDS * ST3_COLUMNS);
        float * floats = quantized ? sums + m * ST3_COLUMNS : nullptr;

        for (int64_t k0 = 0; k0 < p.k; k0 += K) {
            const int64_t k1 = least(k0 + K, p.k);
            for (int64_t c = 0; c < n1 - n0; c += PANEL) {
                pack((const char *) p.w, p.w_row, p.w_type, n0 + c, n1, k0, k1, panels + DWORDS * c, floats);
            }
            for (int64_t i = 0, rows; i < m; i += rows) {
                rows = rows_at(i, m);
                for (int64_t c = 0; c < n1 - n0; c += PANEL) {
                    tile_of(rows, (const Elem *) p.x + (m0 + i) * p.k + k0, p.k, panels + DWORDS * c, (k1 - k0) / STEP,
                            sums + i * ST3_COLUMNS + c, ST3_COLUMNS, k0 > 0);
                }
            }
        }
        for (int64_t c = 0; c < n1 - n0; c += LANES) {
            const int64_t n    = n1 - n0 - c;
            const F       bias = p.bias ? S::load_n(p.bias + n0 + c, n) : S::set1(0.0f);
            for (int64_t i = 0; i < m; ++i) {
                const F sum = S::add(S::load(sums + i * ST3_COLUMNS + c), bias);
                store(p.y, p.y_type, (m0 + i) * p.n + n0 + c, activate(sum, p.activation), n);
            }
        }
    }

    static void attend(const st3_attention & a, int64_t m0, int64_t m1) {
        static thread_local scratch memory;

        const int64_t n_kv = up(a.n_kv, PANEL);
        const int64_t d    = up(a.d, PANEL);

        int32_t * keys = (int32_t *) memory.get(
                2 * n_kv * d / STEP * sizeof(int32_t) + ROWS * (d + n_kv) * (sizeof(Elem) + sizeof(float)));
        int32_t * values  = keys + n_kv * d / STEP;                // [d / PANEL] panels
        float *   scores  = (float *) (values + n_kv * d / STEP);  // [ROWS][n_kv]
        float *   sums    = scores + ROWS * n_kv;                  // [ROWS][d]
        Elem *    query   = (Elem *) (sums + ROWS * d);            // [ROWS][d]
        Elem *    weights = query + ROWS * d;                      // [ROWS][n_kv]

        for (int64_t n = 0; n < n_kv; n += PANEL) {
            pack((const char *) a.k, a.k_row * sizeof(float), GGML_TYPE_F32, n, a.n_kv, 0, a.d, keys + n * d / STEP,
                 nullptr);
        }
        for (int64_t c = 0; c < d; c += LANES) {  // STEP rows of v are one of dwords
            int32_t * to = values + c / PANEL * PANEL * n_kv / STEP + c % PANEL;
            for (int64_t n = 0; n < n_kv; n += STEP, to += PANEL) {
                F rows[STEP];
                for (int i = 0; i < STEP; ++i) {
                    rows[i] = S::load_n(a.v + (n + i) * a.v_row + c, n + i < a.n_kv ? a.d - c : 0);
                }
                S::store_dwords(to, S::join(rows));
            }
        }
        const F scale = S::set1(a.scale * LOG2_E);  // powers of two below
        for (int64_t i = m0, rows; i < m1; i += rows) {
            rows = rows_at(i, m1);
            for (int r = 0; r < rows; ++r) {
                for (int64_t c = 0; c < d; c += LANES) {
                    const F x = S::load_n(a.q + (i + r) * a.q_row + c, a.d - c);
                    S::store_n(query + r * d + c, S::mul(x, scale), LANES);
                }
            }
            for (int64_t n = 0; n < n_kv; n += PANEL) {
                tile_of(rows, query, d, keys + n * d / STEP, a.d / STEP, scores + n, n_kv, false);
            }
            float inverse[ROWS];
            for (int r = 0; r < rows; ++r) {
                const float * s   = scores + r * n_kv;
                F             max = S::set1(-__builtin_inff());
                for (int64_t n = 0; n < a.n_kv; n += LANES) {
                    max = S::max(max, S::select(S::load(s + n), max, a.n_kv - n));
                }
                max   = S::set1(S::reduce_max(max));
                F sum = S::set1(0.0f);
                for (int64_t n = 0; n < n_kv; n += LANES) {
                    const F e = S::select(exp2(S::sub(S::load(s + n), max)), S::set1(0.0f), a.n_kv - n);
                    sum       = S::add(sum, e);
                    S::store_n(weights + r * n_kv + n, e, LANES);
                }
                inverse[r] = 1.0f / S::reduce_add(sum);
            }
            for (int64_t c = 0; c < d; c += PANEL) {
                tile_of(rows, weights, n_kv, values + c * n_kv / STEP, n_kv / STEP, sums + c, d, false);
            }
            for (int r = 0; r < rows; ++r) {
                for (int64_t c = 0; c < a.d; c += LANES) {
                    const F x = S::mul(S::load(sums + r * d + c), S::set1(inverse[r]));
                    store(a.y, a.y_type, (i + r) * a.y_row + c, x, a.d - c);
                }
            }
        }
    }
};

}  // namespace
