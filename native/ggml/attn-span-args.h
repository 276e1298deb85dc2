// attn-span-args.h - what the host tells the kernels of attn-span-kernel.h. C, C++, CUDA and Metal read this text.
#pragma once

#if !defined(__METAL_VERSION__)
#include <stdint.h>
#endif

enum {
    ATTN_SPAN_LOGITS_WARPS = 4,  // warps of a threadgroup
    ATTN_SPAN_REDUCE_WARPS = 16,
};

// Types of K that the kernels read.
enum {
    ATTN_SPAN_F32,
    ATTN_SPAN_F16,
    ATTN_SPAN_BF16,
    ATTN_SPAN_Q8_0,
    ATTN_SPAN_Q4_0,
    ATTN_SPAN_Q4_1,
    ATTN_SPAN_Q5_0,
    ATTN_SPAN_Q5_1,
};

// A launch takes a group of query rows, all heads of them; "query" is one row of one head. Strides are bytes.
struct attn_span_args {
    int32_t  d;         // head size, a multiple of 8
    int32_t  n_kv;      // cells
    int32_t  n_rep;     // query heads of one KV head
    int32_t  n_row;     // query rows of this group
    int32_t  n_query;   // queries of this group
    int32_t  n_span;    // cells asked for
    int32_t  lanes;     // lanes that share a K row: 8, 16 or 32
    int32_t  chunk;     // cells of a split
    int32_t  n_split;   // splits of the cells
    int32_t  merge;     // lanes that merge the splits of a query: a power of two up to 32
    int32_t  mask_f16;  // the mask is F16, else F32
    int32_t  is_max;    // reduce by the maximum, else by the mean
    int32_t  first;     // no group has written results yet
    float    scale;     // of the dot products
    float    share;     // of one query in the mean
    uint64_t q_row, q_head;
    uint64_t k_cell, k_head;
    uint64_t mask_row;
};
