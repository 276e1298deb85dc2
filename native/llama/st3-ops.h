// st3-ops.h - what recording and cutting compute, from tensors alone, by stock ops and ours.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

namespace st3_ops {

// The first n of t, a vector.
ggml_tensor * first_of(ggml_context * ctx, ggml_tensor * t, int64_t n);

// Rows [row, row + n) of t, a matrix.
ggml_tensor * view_rows(ggml_context * ctx, ggml_tensor * t, int64_t row, int64_t n);

// All of t as rows of one element each, and as a vector.
ggml_tensor * as_column(ggml_context * ctx, ggml_tensor * t);
ggml_tensor * as_vector(ggml_context * ctx, ggml_tensor * t);

// F32 [n], all of that value.
ggml_tensor * filled(ggml_context * ctx, int64_t n, float value);

// The k highest of rank F32 [n], ascending: I32 [k].
ggml_tensor * top_k_in_order(ggml_context * ctx, ggml_tensor * rank, int64_t k);

// ggml_attn_span(), on a device without a kernel for it by stock ops that compute the same. F32 [ids]
ggml_tensor * attention_of(
        ggml_context * ctx, ggml_backend_dev_t dev, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask,
        ggml_tensor * ids, float scale, bool max);

// Rows F32 [n_embd, n], each scaled to a mean square of 1.
ggml_tensor * directions(ggml_context * ctx, ggml_tensor * rows);

// Cosines of directions F32 [n_embd, n] and [n_embd, m] with each other: F32 [n, m].
ggml_tensor * cosines(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b);

// Scores F32 [n], each times its token's distance to the most similar one of a higher score: 1 - the largest cosine of their
// directions F32 [n_embd, n], where that is above 0.
ggml_tensor * by_distance(ggml_context * ctx, ggml_tensor * score, ggml_tensor * direction);

// The place among the kept, stay I32 [n_keep], of each token's owner, the kept one of the most similar direction: I32 [n].
ggml_tensor * owners_of(ggml_context * ctx, ggml_tensor * direction, ggml_tensor * stay);

// Sums of the rows F32 [m, n] that have the same owner, I32 [n] below n_keep: F32 [m, n_keep]. On a device that cannot add rows
// by an index, by a product.
ggml_tensor *
sum_by_owner(ggml_context * ctx, ggml_backend_dev_t dev, ggml_tensor * rows, ggml_tensor * owner, int64_t n_keep);

}  // namespace st3_ops
