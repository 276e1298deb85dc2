// attn-span.h - GGML_OP_ATTN_SPAN: how much attention a set of KV cells receives.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

enum ggml_attn_span_reduce {
    GGML_ATTN_SPAN_MEAN = 0,
    GGML_ATTN_SPAN_MAX  = 1,
};

// result[i] = reduce over heads h and queries r of softmax_c(scale * <q[h, r], k[h / n_rep, c]> + mask[r, c]) at c = ids[i]
// The softmax runs over all n_kv cells; a query that sees no cell counts as probability 0 everywhere.
//
//   q      F32       [d, n_q, n_head]     rows contiguous, any stride above
//   k      any type  [d, n_kv, n_head_kv] rows contiguous, any stride above (a permuted cache view); n_head % n_head_kv == 0
//   mask   F16, F32  [n_kv, n_q]          rows contiguous; -inf hides a cell; shared by all heads
//   ids    I32       [n_span]             cells, each in [0, n_kv)
//   result F32       [n_span]
GGML_API struct ggml_tensor * ggml_attn_span(
        struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * mask,
        struct ggml_tensor * ids, float scale, enum ggml_attn_span_reduce reduce);

#ifdef __cplusplus
}
#endif
