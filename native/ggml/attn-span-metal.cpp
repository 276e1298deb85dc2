#include "attn-span-metal.h"

#include "attn-span-gpu.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <cstdio>

static constexpr int N_FILL = 256;  // threadgroups: enough for the largest GPU

// The result is followed by the logits, and these by the maxima and sums.
struct scratch {
    size_t logits, part, end;

    scratch(const ggml_tensor * op, const attn_span_plan & plan) :
        logits(GGML_PAD(ggml_nbytes(op), 16)),
        part(GGML_PAD(logits + plan.n_logits * sizeof(float), 16)),
        end(part + plan.n_part * 2 * sizeof(float)) {}
};

static ggml_metal_buffer_id buffer_id(const ggml_tensor * t, size_t offset) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    ggml_metal_buffer_id  id     = ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);

    id.offs += offset;
    return id;
}

static void set_pipeline(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const char * name, int n_warp) {
    auto pipeline = ggml_metal_library_get_pipeline(lib, name);
    if (!pipeline.pipeline) {
        pipeline = ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
    }
    GGML_ASSERT(ggml_metal_pipeline_max_theads_per_threadgroup(pipeline) >= 32 * n_warp);
    ggml_metal_encoder_set_pipeline(enc, pipeline);
}

size_t ggml_metal_attn_span_extra(const ggml_tensor * op) {
    return scratch(op, ggml_attn_span_gpu_plan(op, N_FILL)).end - ggml_nbytes(op);
}

void ggml_metal_attn_span(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    const auto    plan = ggml_attn_span_gpu_plan(op, N_FILL);
    const scratch at(op, plan);

    char name[64];
    snprintf(name, sizeof(name), "kernel_attn_span_logits_%s_%d", ggml_type_name(op->src[1]->type), plan.tile);

    for (int row = 0; row < plan.n_q; row += plan.rows_per_group) {
        auto group = ggml_attn_span_gpu_group(&plan, row);

        if (row > 0) {
            ggml_metal_encoder_memory_barrier(enc);  // the scratch memory is used again
        }

        set_pipeline(lib, enc, name, ATTN_SPAN_LOGITS_WARPS);
        ggml_metal_encoder_set_bytes(enc, &group.args, sizeof(group.args), 0);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op->src[0], group.q_offset), 1);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op->src[1], 0), 2);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op->src[2], group.mask_offset), 3);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op, at.logits), 4);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op, at.part), 5);
        ggml_metal_encoder_set_threadgroup_memory_size(enc, 2 * sizeof(float) * ATTN_SPAN_LOGITS_WARPS * plan.tile, 0);
        ggml_metal_encoder_dispatch_threadgroups(
                enc, group.args.n_split, group.n_tile, plan.n_head_kv, 32, ATTN_SPAN_LOGITS_WARPS, 1);

        ggml_metal_encoder_memory_barrier(enc);

        set_pipeline(lib, enc, "kernel_attn_span_reduce", ATTN_SPAN_REDUCE_WARPS);
        ggml_metal_encoder_set_bytes(enc, &group.args, sizeof(group.args), 0);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op, at.logits), 1);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op, at.part), 2);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op->src[3], 0), 3);
        ggml_metal_encoder_set_buffer(enc, buffer_id(op, 0), 4);
        ggml_metal_encoder_set_threadgroup_memory_size(enc, 2 * sizeof(float) * ATTN_SPAN_REDUCE_WARPS * 32, 0);
        ggml_metal_encoder_dispatch_threadgroups(enc, group.n_block, 1, 1, 32, ATTN_SPAN_REDUCE_WARPS, 1);
    }
}
