// attn-span-gpu.h - what the GPU backends' hosts share: which calls their kernels take, and how these are laid out.
#pragma once

#include "attn-span-args.h"
#include "ggml.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

// How a call is worked off: query rows in groups, so that the logits of one group fit the scratch memory.
struct attn_span_plan {
    struct attn_span_args args;  // of a group of rows_per_group rows

    int     type;  // of K, ATTN_SPAN_*
    int     tile;  // queries that a threadgroup of attn_span_logits takes
    int     n_q;   // query rows in all
    int     rows_per_group;
    int     n_head_kv;
    int64_t n_logits;  // floats of scratch memory
    int64_t n_part;    // pairs of floats of scratch memory
};

// One group, from row on: attn_span_logits over (args.n_split, n_tile, n_head_kv) threadgroups of
// ATTN_SPAN_LOGITS_WARPS warps and as many * tile pairs of shared memory, with q and mask moved on to the row; then
// attn_span_reduce over n_block threadgroups of ATTN_SPAN_REDUCE_WARPS warps and as many * 32 pairs.
struct attn_span_group {
    struct attn_span_args args;

    int    n_tile;
    int    n_block;
    size_t q_offset, mask_offset;  // bytes
};

// Whether the kernels take this call.
bool ggml_attn_span_gpu_supports(const struct ggml_tensor * op);

// n_fill: threadgroups that fill the device. Cells are split until there are about as many.
struct attn_span_plan ggml_attn_span_gpu_plan(const struct ggml_tensor * op, int n_fill);

struct attn_span_group ggml_attn_span_gpu_group(const struct attn_span_plan * plan, int row);

#ifdef __cplusplus
}
#endif
