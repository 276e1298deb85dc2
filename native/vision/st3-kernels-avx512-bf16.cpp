// st3-kernels-avx512-bf16.cpp - compiled for AVX512-BF16 by itself.

#include "st3-kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "st3-avx512.h"

namespace {

struct avx512_bf16 : avx512 {
    using Elem = ggml_bf16_t;
    using avx512::store_n;

    static F dot(F sum, D a, D b) { return _mm512_dpbf16_ps(sum, (__m512bh) a, (__m512bh) b); }

    static void store_n(ggml_bf16_t * y, F x, int64_t n) {
        _mm256_mask_storeu_epi16(y, first(n), (__m256i) _mm512_cvtneps_pbh(x));
    }

    // The elements of two rows in turn.
    static D join(const F * rows) {
        const D even = _mm512_cvtepu16_epi32((__m256i) _mm512_cvtneps_pbh(rows[0]));
        const D odd  = _mm512_cvtepu16_epi32((__m256i) _mm512_cvtneps_pbh(rows[1]));
        return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }

    // 32 elements of a row.
    static D load_row(const void * row, ggml_type type, int64_t k, int64_t k_end) {
        if (!row) {
            return _mm512_setzero_si512();
        }
        if (type == GGML_TYPE_BF16) {
            const __mmask32 lanes = first(k_end - k) | (__mmask32) first(k_end - k - LANES) << LANES;
            return _mm512_maskz_loadu_epi16(lanes, (const ggml_bf16_t *) row + k);
        }
        return (D) _mm512_cvtne2ps_pbh(load_floats(row, type, k + LANES, k_end), load_floats(row, type, k, k_end));
    }
};

}  // namespace

const st3_kernels * st3_kernels_avx512_bf16() {
    static const st3_kernels found = { GGML_TYPE_BF16, kernels<avx512_bf16>::multiply, kernels<avx512_bf16>::attend };

    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ?
                   &found :
                   nullptr;
}

#else

const st3_kernels * st3_kernels_avx512_bf16() { return nullptr; }

#endif
