// attn-span-ref.h - GGML_OP_ATTN_SPAN in plain double precision: what every kernel is held against.
#pragma once

#include <cstdint>

// The operation of attn-span.h over dense arrays:
//   q [n_head][n_q][d], k [n_head_kv][n_kv][d], mask [n_q][n_kv] (-INFINITY hides a cell), ids [n_span], out [n_span]
// is_max: reduce by the maximum, else by the mean. Throws nothing; the caller keeps ids within [0, n_kv).
void attn_span_ref(
        const float * q, const float * k, const float * mask, const int32_t * ids, double * out, int64_t d, int64_t n_q,
        int64_t n_head, int64_t n_kv, int64_t n_head_kv, int64_t n_span, double scale, bool is_max);
