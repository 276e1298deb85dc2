// st3-kernels.h - products and attention of the vision encoder, in the type that a CPU multiplies fastest.
//
// Matrices are row-major; sums are F32. Nothing is kept between calls but a thread's memory to work in.
#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

enum st3_activation {
    ST3_ACTIVATION_NONE,
    ST3_ACTIVATION_GELU,        // by tanh
    ST3_ACTIVATION_GELU_QUICK,  // x * sigmoid(1.702 x)
};

// y = activation(x w^T + bias).
struct st3_product {
    const void *   x;      // [m][k], of the kernels' type; k a multiple of 2
    const void *   w;      // [n][k], of type w_type: F32, F16, BF16 or a quantized one
    size_t         w_row;  // bytes
    ggml_type      w_type;
    const float *  bias;  // [n] or null
    st3_activation activation;
    void *         y;  // [m][n], of type y_type: F32 or the kernels'
    ggml_type      y_type;
    int64_t        k;
    int64_t        n;
};

// y = softmax(scale q k^T) v of one head. Rows are so many elements apart.
struct st3_attention {
    const float * q;  // [n_q][d]
    const float * k;  // [n_kv][d]
    const float * v;  // [n_kv][d]
    void *        y;  // [n_q][d], of type y_type: F32 or the kernels'
    ggml_type     y_type;
    int64_t       q_row;
    int64_t       k_row;
    int64_t       v_row;
    int64_t       y_row;
    int64_t       d;  // a multiple of 2
    int64_t       n_kv;
    float         scale;
};

constexpr int64_t ST3_COLUMNS = 64;

struct st3_kernels {
    ggml_type type;  // of what is multiplied: BF16 or F32

    // Rows m0 <= m < m1 and columns n0 <= n < n1 of a product; n1 - n0 <= ST3_COLUMNS.
    void (*multiply)(const st3_product & p, int64_t m0, int64_t m1, int64_t n0, int64_t n1);

    // Queries m0 <= m < m1 of an attention.
    void (*attend)(const st3_attention & a, int64_t m0, int64_t m1);
};

// Each null where this build or this CPU has not got the instructions.
const st3_kernels * st3_kernels_avx512_bf16();
const st3_kernels * st3_kernels_avx512();
const st3_kernels * st3_kernels_avx2();
