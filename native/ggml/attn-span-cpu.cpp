#include "attn-span-cpu.h"

#include "attn-span.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// A thread takes (KV head, block of queries) pairs, so that a dequantized K row serves every query of the block.
static constexpr int64_t QUERY_BLOCK = 16;

// Floats that one thread needs: its partial result, one K row, and the logits of a block of queries.
static size_t work_floats(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];

    return GGML_PAD(dst->ne[0] + k->ne[0] + QUERY_BLOCK * k->ne[1], 64);  // no two threads share a cache line
}

size_t ggml_attn_span_cpu_work_size(const ggml_tensor * dst, int n_tasks) {
    return work_floats(dst) * sizeof(float) * n_tasks;
}

static float mask_at(const ggml_tensor * mask, int64_t row, int64_t cell) {
    const char * data = (const char *) mask->data + row * mask->nb[1];

    return mask->type == GGML_TYPE_F16 ? GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) data)[cell]) :
                                         ((const float *) data)[cell];
}

void ggml_compute_forward_attn_span(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * mask = dst->src[2];
    const ggml_tensor * ids  = dst->src[3];

    const float scale  = ggml_get_op_params_f32(dst, 0);
    const bool  is_max = ggml_get_op_params_i32(dst, 1) == GGML_ATTN_SPAN_MAX;

    const int64_t d      = k->ne[0];
    const int64_t n_kv   = k->ne[1];
    const int64_t n_span = dst->ne[0];
    const int64_t n_rep  = q->ne[2] / k->ne[2];
    const int64_t n_rows = n_rep * q->ne[1];  // queries of one KV head, numbered query-first

    // ggml's own conversion of F16 goes number by number, the CPU backend's by vectors
    const ggml_to_float_t to_float =
            k->type == GGML_TYPE_F16 ?
                    [](const void * x, float * y, int64_t n) { ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, n); } :
                    ggml_get_type_traits(k->type)->to_float;
    GGML_ASSERT(k->type == GGML_TYPE_F32 || to_float);

    const size_t n_work = work_floats(dst);

    float * partial = (float *) params->wdata + params->ith * n_work;
    float * k_row   = partial + n_span;
    float * logits  = k_row + d;

    const int32_t * cells = (const int32_t *) ids->data;

    std::fill(partial, partial + n_span, 0.0f);

    const int64_t n_blocks = (n_rows + QUERY_BLOCK - 1) / QUERY_BLOCK;

    for (int64_t item = params->ith; item < n_blocks * k->ne[2]; item += params->nth) {
        const int64_t hk = item / n_blocks;
        const int64_t r0 = (item % n_blocks) * QUERY_BLOCK;
        const int64_t r1 = std::min(r0 + QUERY_BLOCK, n_rows);

        for (int64_t c = 0; c < n_kv; ++c) {
            const char *  data = (const char *) k->data + c * k->nb[1] + hk * k->nb[2];
            const float * row  = nullptr;  // made when the first query sees this cell

            for (int64_t r = r0; r < r1; ++r) {
                float * logit = logits + (r - r0) * n_kv + c;

                *logit = mask_at(mask, r / n_rep, c);
                if (*logit == -INFINITY) {
                    continue;
                }
                if (row == nullptr) {
                    if (k->type == GGML_TYPE_F32) {
                        row = (const float *) data;
                    } else {
                        to_float(data, k_row, d);
                        row = k_row;
                    }
                }

                const char * q_row =
                        (const char *) q->data + (r / n_rep) * q->nb[1] + (hk * n_rep + r % n_rep) * q->nb[2];

                float dot = 0.0f;
                ggml_vec_dot_f32(d, &dot, 0, (const float *) q_row, 0, row, 0, 1);
                *logit += scale * dot;
            }
        }

        for (int64_t r = r0; r < r1; ++r) {
            float * p = logits + (r - r0) * n_kv;

            float max = -INFINITY;
            ggml_vec_max_f32(n_kv, &max, p);
            if (max == -INFINITY) {
                continue;
            }
            const float inv = (float) (1.0 / ggml_vec_soft_max_f32(n_kv, p, p, max));

            for (int64_t i = 0; i < n_span; ++i) {
                const float prob = p[cells[i]] * inv;
                partial[i]       = is_max ? std::max(partial[i], prob) : partial[i] + prob;
            }
        }
    }

    ggml_barrier(params->threadpool);

    const int64_t dr = (n_span + params->nth - 1) / params->nth;
    const int64_t i1 = std::min(n_span, dr * (params->ith + 1));

    for (int64_t i = dr * params->ith; i < i1; ++i) {
        double acc = 0.0;
        for (int t = 0; t < params->nth; ++t) {
            const double x = ((const float *) params->wdata)[t * n_work + i];
            acc            = is_max ? std::max(acc, x) : acc + x;
        }
        ((float *) dst->data)[i] = (float) (is_max ? acc : acc / (double) (q->ne[1] * q->ne[2]));
    }
}
