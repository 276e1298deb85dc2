// st3-kernels-avx512.cpp - compiled for AVX-512 by itself.

#include "st3-kernels.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "st3-avx512.h"

const st3_kernels * st3_kernels_avx512() {
    static const st3_kernels found = { GGML_TYPE_F32, kernels<avx512>::multiply, kernels<avx512>::attend };

    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl") ?
                   &found :
                   nullptr;
}

#else

const st3_kernels * st3_kernels_avx512() { return nullptr; }

#endif
