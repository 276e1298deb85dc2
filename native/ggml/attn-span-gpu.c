#include "attn-span-gpu.h"

#include "attn-span.h"
#include "ggml-impl.h"

#include <stdint.h>

#define MAX_LOGITS (8 << 20)  // floats of scratch memory, unless a single row needs more
#define MAX_ROWS   1024       // of a group, so that no launch exceeds a grid's limits

static int k_type(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return ATTN_SPAN_F32;
        case GGML_TYPE_F16: return ATTN_SPAN_F16;
        case GGML_TYPE_BF16: return ATTN_SPAN_BF16;
        case GGML_TYPE_Q8_0: return ATTN_SPAN_Q8_0;
        case GGML_TYPE_Q4_0: return ATTN_SPAN_Q4_0;
        case GGML_TYPE_Q4_1: return ATTN_SPAN_Q4_1;
        case GGML_TYPE_Q5_0: return ATTN_SPAN_Q5_0;
        case GGML_TYPE_Q5_1: return ATTN_SPAN_Q5_1;
        default: return -1;
    }
}

static int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t rows_of_scratch(int64_t n_logits_of_row) {
    return MIN(MAX_ROWS, MAX(1, MAX_LOGITS / MAX(1, n_logits_of_row)));
}

bool ggml_attn_span_gpu_supports(const struct ggml_tensor * op) {
    const struct ggml_tensor * q = op->src[0];
    const struct ggml_tensor * k = op->src[1];

    // rows that are not quantized are read 16 bytes at a time; a tensor's own memory is aligned to more
    const size_t step = ggml_is_quantized(k->type) ? 2 : 16;

    return k_type(k->type) >= 0 && k->ne[0] % 8 == 0 && k->ne[0] <= 256 && k->nb[1] % step == 0 &&
           k->nb[2] % step == 0 && k->view_offs % step == 0 && q->ne[2] * k->ne[1] <= INT32_MAX && op->ne[0] > 0;
}

struct attn_span_plan ggml_attn_span_gpu_plan(const struct ggml_tensor * op, int n_fill) {
    const struct ggml_tensor * q    = op->src[0];
    const struct ggml_tensor * k    = op->src[1];
    const struct ggml_tensor * mask = op->src[2];

    const int64_t n_head   = q->ne[2];
    const int64_t n_kv     = k->ne[1];
    const int64_t n_groups = div_up(q->ne[1], rows_of_scratch(n_head * n_kv));
    const int64_t n_row    = div_up(q->ne[1], n_groups);
    const int64_t n_rep    = n_head / k->ne[2];

    struct attn_span_plan plan = {
        .args = {
            .d        = (int32_t) k->ne[0],
            .n_kv     = (int32_t) n_kv,
            .n_rep    = (int32_t) n_rep,
            .n_row    = (int32_t) n_row,
            .n_query  = (int32_t) (n_head * n_row),
            .n_span   = (int32_t) op->ne[0],
            .lanes    = 8,
            .merge    = 1,
            .mask_f16 = mask->type == GGML_TYPE_F16,
            .is_max   = ggml_get_op_params_i32(op, 1) == GGML_ATTN_SPAN_MAX,
            .scale    = ggml_get_op_params_f32(op, 0),
            .q_row    = q->nb[1],
            .q_head   = q->nb[2],
            .k_cell   = k->nb[1],
            .k_head   = k->nb[2],
            .mask_row = mask->nb[1],
        },
        .type           = k_type(k->type),
        .tile           = n_rep * n_row == 1 ? 1 : n_rep * n_row <= 4 ? 4 : 8,
        .n_q            = (int) q->ne[1],
        .rows_per_group = (int) n_row,
        .n_head_kv      = (int) k->ne[2],
    };
    struct attn_span_args * args = &plan.args;

    while (args->lanes * 8 < args->d) {
        args->lanes *= 2;
    }
    args->share = args->is_max ? 1.0f : 1.0f / (float) (n_head * q->ne[1]);

    // a split is whole passes: what the warps of a threadgroup take at once
    const int64_t pass     = ATTN_SPAN_LOGITS_WARPS * (8 / plan.tile) * (32 / args->lanes);
    const int64_t n_pass   = div_up(n_kv, pass);
    const int64_t n_others = div_up(n_rep * n_row, plan.tile) * k->ne[2];

    args->chunk   = (int32_t) (pass * div_up(n_pass, MIN(n_pass, div_up(n_fill, n_others))));
    args->n_split = (int32_t) div_up(n_kv, args->chunk);
    while (args->merge < args->n_split && args->merge < 32) {
        args->merge *= 2;
    }

    plan.n_logits = args->n_query * n_kv;
    plan.n_part   = (int64_t) args->n_query * args->n_split;
    return plan;
}

struct attn_span_group ggml_attn_span_gpu_group(const struct attn_span_plan * plan, int row) {
    struct attn_span_group group = {
        .args        = plan->args,
        .q_offset    = row * plan->args.q_row,
        .mask_offset = row * plan->args.mask_row,
    };
    struct attn_span_args * args = &group.args;

    args->n_row   = MIN(args->n_row, plan->n_q - row);
    args->n_query = args->n_row * args->n_rep * plan->n_head_kv;
    args->first   = row == 0;

    group.n_tile  = (int) div_up(args->n_rep * args->n_row, plan->tile);
    group.n_block = (int) div_up(args->n_span, 32);
    return group;
}
