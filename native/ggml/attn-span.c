#include "attn-span.h"

#include "ggml-impl.h"

struct ggml_tensor * ggml_attn_span(
        struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * mask,
        struct ggml_tensor * ids, float scale, enum ggml_attn_span_reduce reduce) {
    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32);
    GGML_ASSERT(ids->type == GGML_TYPE_I32);

    GGML_ASSERT(q->ne[0] == k->ne[0] && q->ne[2] % k->ne[2] == 0);
    GGML_ASSERT(mask->ne[0] == k->ne[1] && mask->ne[1] == q->ne[1]);
    GGML_ASSERT(q->ne[3] == 1 && k->ne[3] == 1 && mask->ne[2] == 1 && mask->ne[3] == 1);
    GGML_ASSERT(ggml_is_vector(ids) && ggml_is_contiguous(ids));
    GGML_ASSERT(
            q->nb[0] == ggml_type_size(q->type) && k->nb[0] == ggml_type_size(k->type) &&
            mask->nb[0] == ggml_type_size(mask->type));
    GGML_ASSERT(reduce == GGML_ATTN_SPAN_MEAN || reduce == GGML_ATTN_SPAN_MAX);

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ids->ne[0]);

    ggml_set_op_params_f32(result, 0, scale);
    ggml_set_op_params_i32(result, 1, reduce);

    result->op     = GGML_OP_ATTN_SPAN;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = mask;
    result->src[3] = ids;

    return result;
}
