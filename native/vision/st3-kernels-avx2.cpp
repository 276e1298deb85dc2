// st3-kernels-avx2.cpp - compiled for AVX2 with FMA and F16C by itself.

#include "st3-kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "st3-kernels-impl.h"

#include <cpuid.h>
#include <immintrin.h>

namespace {

struct avx2 {
    using F    = __m256;
    using D    = __m256i;
    using Elem = float;

    static constexpr int LANES = 8;
    static constexpr int ROWS  = 6;  // 12 sums, a panel's 2 registers, and what is broadcast

    // Lanes [0, n), all bits of each.
    static __m256i first(int64_t n) {
        const int32_t have = n >= LANES ? LANES : n <= 0 ? 0 : (int32_t) n;
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(have), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }

    static F set1(float x) { return _mm256_set1_ps(x); }

    static F load(const float * x) { return _mm256_loadu_ps(x); }

    static F load_n(const float * x, int64_t n) { return n >= LANES ? load(x) : _mm256_maskload_ps(x, first(n)); }

    static void store(float * y, F x) { _mm256_storeu_ps(y, x); }

    static void store_n(float * y, F x, int64_t n) { n >= LANES ? store(y, x) : _mm256_maskstore_ps(y, first(n), x); }

    static D load_dwords(const int32_t * x) { return _mm256_loadu_si256((const __m256i *) x); }

    static void store_dwords(int32_t * y, D x) { _mm256_storeu_si256((__m256i *) y, x); }

    static D broadcast(const void * x) {
        float dword;
        memcpy(&dword, x, sizeof(dword));
        return _mm256_castps_si256(_mm256_set1_ps(dword));
    }

    static F dot(F sum, D a, D b) { return _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum); }

    static D join(const F * rows) { return _mm256_castps_si256(rows[0]); }

    static F add(F a, F b) { return _mm256_add_ps(a, b); }

    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }

    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }

    static F div(F a, F b) { return _mm256_div_ps(a, b); }

    static F min(F a, F b) { return _mm256_min_ps(a, b); }

    static F max(F a, F b) { return _mm256_max_ps(a, b); }

    static F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

    static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

    static F scale(F x, F n) {  // -126 <= n <= 127
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }

    static F select(F a, F b, int64_t n) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first(n))); }

    static float reduce_max(F x) {
        float lanes[LANES];
        store(lanes, x);
        for (const float lane : lanes) {
            lanes[0] = lane > lanes[0] ? lane : lanes[0];
        }
        return lanes[0];
    }

    static float reduce_add(F x) {
        float lanes[LANES], sum = 0.0f;
        store(lanes, x);
        for (const float lane : lanes) {
            sum += lane;
        }
        return sum;
    }

    // 8 elements of a row from k on, zeros from k_end on.
    static D load_row(const void * row, ggml_type type, int64_t k, int64_t k_end) {
        if (!row) {
            return _mm256_setzero_si256();
        }
        if (type == GGML_TYPE_F32) {
            return _mm256_castps_si256(load_n((const float *) row + k, k_end - k));
        }
        uint16_t     held[LANES] = {};
        const void * x           = (const uint16_t *) row + k;
        if (k_end - k < LANES) {
            memcpy(held, x, (k_end - k) * sizeof(uint16_t));
            x = held;
        }
        const __m128i halves = _mm_loadu_si128((const __m128i *) x);
        return type == GGML_TYPE_F16 ? _mm256_castps_si256(_mm256_cvtph_ps(halves)) :
                                       _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    }

    // Rows of 8 dwords to columns.
    static void transpose(D r[LANES]) {
        D t[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i += 2) {
            t[i]     = _mm256_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i += 4) {
            r[i]     = _mm256_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) {
            t[i]     = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
            t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
        }
        memcpy(r, t, sizeof(t));
    }
};

}  // namespace

// __builtin_cpu_supports does not know it before GCC 11 and clang 18.
static bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

const st3_kernels * st3_kernels_avx2() {
    static const st3_kernels found = { GGML_TYPE_F32, kernels<avx2>::multiply, kernels<avx2>::attend };

    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() ? &found : nullptr;
}

#else

const st3_kernels * st3_kernels_avx2() { return nullptr; }

#endif
