// st3-bf16.h - products and attention of the vision encoder in BF16, on CPUs with AVX512-BF16.
//
// Matrices are row-major; sums are F32. Rows of activations are BF16, two of them a dword as VDPBF16PS takes them.
#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

// Whether this CPU and this build have it.
bool st3_bf16_available();

enum st3_activation {
    ST3_ACTIVATION_NONE,
    ST3_ACTIVATION_GELU,        // by tanh
    ST3_ACTIVATION_GELU_QUICK,  // x * sigmoid(1.702 x)
};

// y = activation(x w^T + bias), computed for rows m0 <= m < m1 and columns n0 <= n < n1 (n1 - n0 <= ST3_BF16_COLUMNS).
struct st3_bf16_product {
    const ggml_bf16_t * x;      // [m][k]
    const void *        w;      // [n][k], of type w_type: F32, F16, BF16 or a quantized one
    size_t              w_row;  // bytes
    ggml_type           w_type;
    const float *       bias;  // [n] or null
    st3_activation      activation;
    void *              y;  // [m][n_total], F32 or BF16
    bool                y_bf16;
    int64_t             k, n_total;
};

constexpr int64_t ST3_BF16_COLUMNS = 64;

void st3_bf16_multiply(const st3_bf16_product & p, int64_t m0, int64_t m1, int64_t n0, int64_t n1);

// y = softmax(scale q k^T) v of one head, computed for queries m0 <= m < m1. Strides are in elements.
struct st3_bf16_attention {
    const float *q, *k, *v;  // [n][d] each
    int64_t      q_row, k_row, v_row, y_row;
    void *       y;  // [n_q][d], F32 or BF16
    bool         y_bf16;
    int64_t      d, n_kv;  // d even
    float        scale;
};

void st3_bf16_attend(const st3_bf16_attention & a, int64_t m0, int64_t m1);
