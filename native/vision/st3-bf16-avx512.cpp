// st3-bf16-avx512.cpp - compiled for AVX512-BF16 by itself: no templates of the standard library here, or the linker may
// choose this file's copies of them for CPUs without it.

#include "st3-bf16.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr int     LANES   = 16;         // F32 in a register, and pairs of BF16
constexpr int64_t PANEL   = 2 * LANES;  // columns that a tile computes
constexpr int     ROWS    = 14;         // and its most rows: 28 sums, and the 2 registers of a panel
constexpr int64_t K_BLOCK = 1024;       // of which a panel is packed at once: it stays in L2

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory of one thread that grows to the largest size asked for.
struct scratch {
    char * data = nullptr;
    size_t size = 0;

    ~scratch() { free(data); }

    void * get(size_t n) {
        if (n > size) {
            free(data);
            data = (char *) aligned_alloc(64, up(n, 64));
            size = data ? n : 0;
            if (!data) {
                GGML_ABORT("st3: no memory for the vision encoder");
            }
        }
        return data;
    }
};

__m512i as_bits(__m512bh x) { return (__m512i) x; }

__m512bh as_bf16(__m512i x) { return (__m512bh) x; }

__m512 exp2_of(__m512 x) {  // x <= 127; relative error below 1e-6
    x                = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 n   = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f   = _mm512_sub_ps(x, n);
    __m512       sum = _mm512_set1_ps(1.5403530e-4f);
    sum              = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.3333558e-3f));
    sum              = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(9.6181291e-3f));
    sum              = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(5.5504109e-2f));
    sum              = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(2.4022651e-1f));
    sum              = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(6.9314718e-1f));
    sum              = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

__m512 activate(__m512 x, st3_activation activation) {
    constexpr float LOG2_E = 1.44269504f;

    __m512 exponent;
    switch (activation) {
        case ST3_ACTIVATION_GELU_QUICK: exponent = _mm512_mul_ps(x, _mm512_set1_ps(-1.702f * LOG2_E)); break;
        case ST3_ACTIVATION_GELU: {  // (1 + tanh(u)) / 2 == 1 / (1 + exp(-2 u))
            const __m512 u = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
            exponent       = _mm512_mul_ps(_mm512_mul_ps(x, u), _mm512_set1_ps(-2 * 0.79788456f * LOG2_E));
            break;
        }
        default: return x;
    }
    exponent = _mm512_min_ps(exponent, _mm512_set1_ps(126.0f));
    return _mm512_div_ps(x, _mm512_add_ps(exp2_of(exponent), _mm512_set1_ps(1.0f)));
}

// Lanes [0, n) of 16.
__mmask16 first(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16) ((1u << n) - 1); }

void store(void * y, bool bf16, int64_t i, __m512 x, __mmask16 lanes) {
    if (bf16) {
        _mm256_mask_storeu_epi16((ggml_bf16_t *) y + i, lanes, (__m256i) _mm512_cvtneps_pbh(x));
    } else {
        _mm512_mask_storeu_ps((float *) y + i, lanes, x);
    }
}

// c[M][32] (+)= a[M][2 pairs] panel[pairs][32][2].
template <int M>
void tile(
        const ggml_bf16_t * a, int64_t a_row, const ggml_bf16_t * panel, int64_t pairs, float * c, int64_t c_row,
        bool add) {
    __m512 lo[M], hi[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        lo[i] = add ? _mm512_loadu_ps(c + i * c_row) : _mm512_setzero_ps();
        hi[i] = add ? _mm512_loadu_ps(c + i * c_row + LANES) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; ++p) {
        const __m512bh b0 = as_bf16(_mm512_load_si512(panel + p * 2 * PANEL));
        const __m512bh b1 = as_bf16(_mm512_load_si512(panel + p * 2 * PANEL + PANEL));
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            int32_t pair;
            memcpy(&pair, a + i * a_row + 2 * p, sizeof(pair));
            const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
            lo[i]            = _mm512_dpbf16_ps(lo[i], x, b0);
            hi[i]            = _mm512_dpbf16_ps(hi[i], x, b1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        _mm512_storeu_ps(c + i * c_row, lo[i]);
        _mm512_storeu_ps(c + i * c_row + LANES, hi[i]);
    }
}

using tile_function = void (*)(const ggml_bf16_t *, int64_t, const ggml_bf16_t *, int64_t, float *, int64_t, bool);

constexpr tile_function TILES[ROWS + 1] = { nullptr, tile<1>, tile<2>,  tile<3>,  tile<4>,  tile<5>,  tile<6>, tile<7>,
                                            tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14> };

// Splits n rows evenly into blocks of at most ROWS: the rows of the block at i.
int64_t rows_at(int64_t i, int64_t n) {
    const int64_t left = n - i;
    return up(left, (left + ROWS - 1) / ROWS) / ((left + ROWS - 1) / ROWS);
}

// Rows of 16 dwords to columns.
void transpose(__m512i r[LANES]) {
    __m512i t[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) {
        t[i]     = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 4) {
        r[i]     = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        t[i]      = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4]  = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8]  = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        r[i]      = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8]  = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4]  = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// 32 elements of a row from k on, as BF16, zeros from k_end on.
__m512i load_pairs(const void * row, ggml_type type, int64_t k, int64_t k_end) {
    const int64_t   n  = k_end - k;
    const __mmask16 lo = first(n);
    const __mmask16 hi = first(n - LANES);
    switch (type) {
        case GGML_TYPE_BF16:
            return _mm512_maskz_loadu_epi16((__mmask32) lo | (__mmask32) hi << LANES, (const ggml_bf16_t *) row + k);
        case GGML_TYPE_F16: {
            const ggml_fp16_t * x = (const ggml_fp16_t *) row + k;
            return as_bits(_mm512_cvtne2ps_pbh(
                    _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(hi, x + LANES)),
                    _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lo, x))));
        }
        default: {
            const float * x = (const float *) row + k;
            return as_bits(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(hi, x + LANES), _mm512_maskz_loadu_ps(lo, x)));
        }
    }
}

// Rows n of w, elements k0 <= k < k1, to a panel [pairs up to a multiple of 16][32][2]; rows from n_end on become zeros.
// floats: room for k1 - k0 dequantized elements of 16 rows.
void pack(
        const char * w, size_t w_row, ggml_type type, int64_t n, int64_t n_end, int64_t k0, int64_t k1,
        ggml_bf16_t * panel, float * floats) {
    for (int half = 0; half < 2; ++half, n += LANES) {
        const char *  rows[LANES];
        const int64_t n_rows = least(n_end - n, LANES);
        for (int i = 0; i < n_rows; ++i) {
            rows[i] = w + (n + i) * w_row;
            if (floats) {
                float * to = floats + i * (k1 - k0);
                ggml_get_type_traits(type)->to_float(rows[i] + ggml_row_size(type, k0), to, k1 - k0);
                rows[i] = (const char *) (to - k0);
            }
        }
        const ggml_type loaded = floats ? GGML_TYPE_F32 : type;
        for (int64_t k = k0; k < k1; k += 2 * LANES) {
            __m512i r[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
                r[i] = i < n_rows ? load_pairs(rows[i], loaded, k, k1) : _mm512_setzero_si512();
            }
            transpose(r);
            ggml_bf16_t * to = panel + (k - k0) * PANEL + half * PANEL;
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) {
                _mm512_store_si512(to + i * 2 * PANEL, r[i]);
            }
        }
    }
}

}  // namespace

bool st3_bf16_available() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

void st3_bf16_multiply(const st3_bf16_product & p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    static thread_local scratch memory;

    const bool    quantized = p.w_type != GGML_TYPE_F32 && p.w_type != GGML_TYPE_F16 && p.w_type != GGML_TYPE_BF16;
    const int64_t m         = m1 - m0;
    const size_t  n_panel   = K_BLOCK * PANEL;

    char * data = (char *) memory.get(
            2 * n_panel * sizeof(ggml_bf16_t) + m * ST3_BF16_COLUMNS * sizeof(float) +
            (quantized ? LANES * K_BLOCK * sizeof(float) : 0));
    ggml_bf16_t * panels = (ggml_bf16_t *) data;
    float *       sums   = (float *) (panels + 2 * n_panel);
    float *       floats = quantized ? sums + m * ST3_BF16_COLUMNS : nullptr;

    const int n_panels = n1 - n0 > PANEL ? 2 : 1;
    for (int64_t k0 = 0; k0 < p.k; k0 += K_BLOCK) {
        const int64_t k1 = least(k0 + K_BLOCK, p.k);
        for (int j = 0; j < n_panels; ++j) {
            pack((const char *) p.w, p.w_row, p.w_type, n0 + j * PANEL, n1, k0, k1, panels + j * n_panel, floats);
        }
        for (int64_t i = 0, rows; i < m; i += rows) {
            rows = rows_at(i, m);
            for (int j = 0; j < n_panels; ++j) {
                TILES[rows](
                        p.x + (m0 + i) * p.k + k0, p.k, panels + j * n_panel, (k1 - k0) / 2,
                        sums + i * ST3_BF16_COLUMNS + j * PANEL, ST3_BF16_COLUMNS, k0 > 0);
            }
        }
    }
    for (int64_t n = n0; n < n1; n += LANES) {
        const __mmask16 lanes = first(n1 - n);
        const __m512    bias  = p.bias ? _mm512_maskz_loadu_ps(lanes, p.bias + n) : _mm512_setzero_ps();
        for (int64_t i = 0; i < m; ++i) {
            const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + i * ST3_BF16_COLUMNS + n - n0), bias);
            store(p.y, p.y_bf16, (m0 + i) * p.n_total + n, activate(sum, p.activation), lanes);
        }
    }
}

void st3_bf16_attend(const st3_bf16_attention & a, int64_t m0, int64_t m1) {
    static thread_local scratch memory;

    const int64_t n_kv = up(a.n_kv, PANEL);
    const int64_t d    = up(a.d, PANEL);

    ggml_bf16_t * keys = (ggml_bf16_t *) memory.get(
            (2 * n_kv * d + ROWS * (d + n_kv)) * sizeof(ggml_bf16_t) + ROWS * (n_kv + d) * sizeof(float));
    ggml_bf16_t * values  = keys + n_kv * d;    // [d / 32] panels of n_kv
    ggml_bf16_t * query   = values + n_kv * d;  // [ROWS][d]
    ggml_bf16_t * weights = query + ROWS * d;   // [ROWS][n_kv]
    float *       scores  = (float *) (weights + ROWS * n_kv);
    float *       sums    = scores + ROWS * n_kv;  // [ROWS][d]

    for (int64_t n = 0; n < n_kv; n += PANEL) {
        pack((const char *) a.k, a.k_row * sizeof(float), GGML_TYPE_F32, n, a.n_kv, 0, a.d, keys + n * d, nullptr);
    }
    for (int64_t c = 0; c < d; c += LANES) {  // two rows of v are one row of pairs
        const __mmask16 lanes = first(a.d - c);
        ggml_bf16_t *   to    = values + c / PANEL * PANEL * n_kv + c % PANEL * 2;
        for (int64_t n = 0; n < n_kv; n += 2, to += 2 * PANEL) {
            const __m512 even = _mm512_maskz_loadu_ps(n < a.n_kv ? lanes : 0, a.v + n * a.v_row + c);
            const __m512 odd  = _mm512_maskz_loadu_ps(n + 1 < a.n_kv ? lanes : 0, a.v + (n + 1) * a.v_row + c);
            const auto   wide = [](__m512 x) { return _mm512_cvtepu16_epi32((__m256i) _mm512_cvtneps_pbh(x)); };
            _mm512_store_si512(to, _mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16)));
        }
    }
    const __m512 scale = _mm512_set1_ps(a.scale * 1.44269504f);  // powers of two below
    for (int64_t i = m0, rows; i < m1; i += rows) {
        rows = rows_at(i, m1);
        for (int r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < d; c += LANES) {
                const __m512 x = _mm512_maskz_loadu_ps(first(a.d - c), a.q + (i + r) * a.q_row + c);
                store(query + r * d, true, c, _mm512_mul_ps(x, scale), 0xffff);
            }
        }
        for (int64_t n = 0; n < n_kv; n += PANEL) {
            TILES[rows](query, d, keys + n * d, a.d / 2, scores + n, n_kv, false);
        }
        __m512 inverse[ROWS];
        for (int r = 0; r < rows; ++r) {
            const float * s   = scores + r * n_kv;
            __m512        max = _mm512_set1_ps(-__builtin_inff());
            for (int64_t n = 0; n < a.n_kv; n += LANES) {
                max = _mm512_mask_max_ps(max, first(a.n_kv - n), max, _mm512_loadu_ps(s + n));
            }
            max        = _mm512_set1_ps(_mm512_reduce_max_ps(max));
            __m512 sum = _mm512_setzero_ps();
            for (int64_t n = 0; n < n_kv; n += LANES) {
                const __m512 e =
                        _mm512_maskz_mov_ps(first(a.n_kv - n), exp2_of(_mm512_sub_ps(_mm512_loadu_ps(s + n), max)));
                sum = _mm512_add_ps(sum, e);
                store(weights + r * n_kv, true, n, e, 0xffff);
            }
            inverse[r] = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
        }
        for (int64_t c = 0; c < d; c += PANEL) {
            TILES[rows](weights, n_kv, values + c * n_kv, n_kv / 2, sums + c, d, false);
        }
        for (int r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < a.d; c += LANES) {
                store(a.y, a.y_bf16, (i + r) * a.y_row + c,
                      _mm512_mul_ps(_mm512_loadu_ps(sums + r * d + c), inverse[r]), first(a.d - c));
            }
        }
    }
}

#else

bool st3_bf16_available() { return false; }

void st3_bf16_multiply(const st3_bf16_product &, int64_t, int64_t, int64_t, int64_t) { GGML_ABORT("not built"); }

void st3_bf16_attend(const st3_bf16_attention &, int64_t, int64_t) { GGML_ABORT("not built"); }

#endif
