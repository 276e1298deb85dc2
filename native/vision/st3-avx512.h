// st3-avx512.h - AVX-512 with floats, for the files that are compiled for it.
#pragma once

#include "st3-kernels-impl.h"

#include <immintrin.h>

namespace {

// Lanes [0, n) of 16.
__mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16) ((1u << n) - 1); }

struct avx512 {
    using F    = __m512;
    using D    = __m512i;
    using Elem = float;

    static constexpr int LANES = 16;
    static constexpr int ROWS  = 14;  // 28 sums, a panel's 2 registers, and what is broadcast

    static F set1(float x) { return _mm512_set1_ps(x); }

    static F load(const float * x) { return _mm512_loadu_ps(x); }

    static F load_n(const float * x, int64_t n) { return _mm512_maskz_loadu_ps(first(n), x); }

    static void store(float * y, F x) { _mm512_storeu_ps(y, x); }

    static void store_n(float * y, F x, int64_t n) { _mm512_mask_storeu_ps(y, first(n), x); }

    static D load_dwords(const int32_t * x) { return _mm512_loadu_si512(x); }

    static void store_dwords(int32_t * y, D x) { _mm512_storeu_si512(y, x); }

    static D broadcast(const void * x) {
        int32_t dword;
        memcpy(&dword, x, sizeof(dword));
        return _mm512_set1_epi32(dword);
    }

    static F dot(F sum, D a, D b) { return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum); }

    static D join(const F * rows) { return _mm512_castps_si512(rows[0]); }

    static F add(F a, F b) { return _mm512_add_ps(a, b); }

    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }

    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }

    static F div(F a, F b) { return _mm512_div_ps(a, b); }

    static F min(F a, F b) { return _mm512_min_ps(a, b); }

    static F max(F a, F b) { return _mm512_max_ps(a, b); }

    static F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

    static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

    static F scale(F x, F n) { return _mm512_scalef_ps(x, n); }

    static F select(F a, F b, int64_t n) { return _mm512_mask_blend_ps(first(n), b, a); }

    static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }

    static float reduce_add(F x) { return _mm512_reduce_add_ps(x); }

    // 16 elements of a row from k on, zeros from k_end on.
    static F load_floats(const void * row, ggml_type type, int64_t k, int64_t k_end) {
        const __mmask16 lanes = first(k_end - k);
        switch (type) {
            case GGML_TYPE_F32: return _mm512_maskz_loadu_ps(lanes, (const float *) row + k);
            case GGML_TYPE_F16: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, (const ggml_fp16_t *) row + k));
            default: {
                const __m256i x = _mm256_maskz_loadu_epi16(lanes, (const ggml_bf16_t *) row + k);
                return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
            }
        }
    }

    static D load_row(const void * row, ggml_type type, int64_t k, int64_t k_end) {
        return row ? _mm512_castps_si512(load_floats(row, type, k, k_end)) : _mm512_setzero_si512();
    }

    // Rows of 16 dwords to columns.
    static void transpose(D r[LANES]) {
        D t[LANES];
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
};

}  // namespace
