#include "st3-ops.h"

#include "attn-span.h"

#include <cstdlib>

namespace st3_ops {

ggml_tensor * first_of(ggml_context * ctx, ggml_tensor * t, int64_t n) {
    return t->ne[0] == n ? t : ggml_view_1d(ctx, t, n, 0);
}

ggml_tensor * view_rows(ggml_context * ctx, ggml_tensor * t, int64_t row, int64_t n) {
    return ggml_view_2d(ctx, t, t->ne[0], n, t->nb[1], row * t->nb[1]);
}

ggml_tensor * as_column(ggml_context * ctx, ggml_tensor * t) { return ggml_reshape_2d(ctx, t, 1, ggml_nelements(t)); }

ggml_tensor * as_vector(ggml_context * ctx, ggml_tensor * t) { return ggml_reshape_1d(ctx, t, ggml_nelements(t)); }

ggml_tensor * top_k_in_order(ggml_context * ctx, ggml_tensor * rank, int64_t k) {
    ggml_tensor * top   = ggml_top_k(ctx, rank, (int) k);
    ggml_tensor * order = ggml_argsort(ctx, ggml_cast(ctx, top, GGML_TYPE_F32), GGML_SORT_ORDER_ASC);

    return as_vector(ctx, ggml_get_rows(ctx, as_column(ctx, top), order));
}

// For developers: use stock ops everywhere, as a backend without the op would.
static bool stock_ops_only() {
    static const bool res = getenv("ST3_STOCK_OPS") != nullptr;
    return res;
}

ggml_tensor * attention_of(
        ggml_context * ctx, ggml_backend_dev_t dev, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
        ggml_tensor * ids, float scale, bool max) {
    ggml_tensor * res = ggml_attn_span(ctx, q, k, mask, ids, scale, max ? GGML_ATTN_SPAN_MAX : GGML_ATTN_SPAN_MEAN);
    if (!stock_ops_only() && (!dev || ggml_backend_dev_supports_op(dev, res))) {
        return res;
    }
    const int64_t n_query = q->ne[1] * q->ne[2];

    // a matrix product rounds the queries to the type of a quantized K, and some devices to F16
    ggml_tensor * kq = ggml_mul_mat(ctx, ggml_is_quantized(k->type) ? ggml_cast(ctx, k, GGML_TYPE_F32) : k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    ggml_tensor * p = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);  // [n_kv, n_rows, n_head]

    p = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, p, k->ne[1], n_query)));
    if (max) {
        p = ggml_pool_2d(ctx, p, GGML_OP_POOL_MAX, (int) n_query, 1, (int) n_query, 1, 0, 0);
    } else {
        p = ggml_mean(ctx, p);
    }
    p = ggml_get_rows(ctx, p, ids);  // of [1, n_kv]
    return ggml_reshape_1d(ctx, p, ids->ne[0]);
}

ggml_tensor * filled(ggml_context * ctx, int64_t n, float value) {
    return ggml_fill(ctx, ggml_arange(ctx, 0.0f, (float) n, 1.0f), value);
}

static ggml_tensor * transposed(ggml_context * ctx, ggml_tensor * t) { return ggml_cont(ctx, ggml_transpose(ctx, t)); }

// F32 [n, n]: value where row and column are the same, else 0.
static ggml_tensor * diagonal(ggml_context * ctx, int64_t n, float value) {
    return ggml_diag(ctx, filled(ctx, n, value));
}

ggml_tensor * cosines(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    ggml_tensor * res = ggml_mul_mat(ctx, a, b);
    ggml_prec_set_acc(res, GGML_PREC_F32);
    return ggml_scale(ctx, res, 1.0f / (float) a->ne[0]);
}

ggml_tensor * directions(ggml_context * ctx, ggml_tensor * rows) { return ggml_rms_norm(ctx, rows, 1e-12f); }

ggml_tensor * by_distance(ggml_context * ctx, ggml_tensor * score, ggml_tensor * direction) {
    const int n = (int) score->ne[0];

    ggml_tensor * higher = ggml_sub(ctx, ggml_repeat_4d(ctx, score, n, n, 1, 1), ggml_reshape_2d(ctx, score, 1, n));

    ggml_tensor * nearest = ggml_mul(ctx, cosines(ctx, direction, direction), ggml_step(ctx, higher));
    nearest               = ggml_pool_2d(ctx, nearest, GGML_OP_POOL_MAX, n, 1, n, 1, 0, 0);
    return ggml_mul(ctx, score, ggml_scale_bias(ctx, as_vector(ctx, nearest), -1.0f, 1.0f));
}

ggml_tensor * owners_of(ggml_context * ctx, ggml_tensor * direction, ggml_tensor * stay) {
    const int64_t n_keep = stay->ne[0];

    ggml_tensor * similar = cosines(ctx, ggml_get_rows(ctx, direction, stay), direction);    // [n_keep, n]
    similar               = ggml_set_rows(ctx, similar, diagonal(ctx, n_keep, 2.0f), stay);  // each kept one is its own
    return ggml_argmax(ctx, similar);
}

ggml_tensor *
sum_by_owner(ggml_context * ctx, ggml_backend_dev_t dev, ggml_tensor * rows, ggml_tensor * owner, int64_t n_keep) {
    ggml_tensor * res =
            ggml_get_rows_back(ctx, rows, owner, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rows->ne[0], n_keep));
    if (!stock_ops_only() && (!dev || ggml_backend_dev_supports_op(dev, res))) {
        return res;
    }
    ggml_tensor * owned = ggml_get_rows(ctx, diagonal(ctx, n_keep, 1.0f), owner);  // [n_keep, n]

    res = ggml_mul_mat(ctx, transposed(ctx, rows), transposed(ctx, owned));
    ggml_prec_set_acc(res, GGML_PREC_F32);
    return res;
}

}  // namespace st3_ops
