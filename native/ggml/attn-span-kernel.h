// attn-span-kernel.h - the kernels of GGML_OP_ATTN_SPAN, in text that CUDA, HIP and Metal compile alike.
//
// attn_span_logits takes up to 8 queries of one KV head and a chunk of its cells. It reads that K once, leaves every
// logit, and for each query the maximum and the sum of exponentials over the chunk. attn_span_reduce merges those of
// all chunks, turns the logits of the cells asked for into probabilities and reduces them over the queries.
//
// A warp is 32 lanes (a simdgroup in Metal). Products and sums are F32.
#pragma once

#include "attn-span-args.h"

#if defined(__METAL_VERSION__)
#define FN                static inline
#define ARGS              constant attn_span_args
#define GLOBAL            device
#define SHARED            threadgroup
#define LOCAL             thread
#define BARRIER()         threadgroup_barrier(mem_flags::mem_threadgroup)
#define SHUFFLE_XOR(x, m) simd_shuffle_xor(x, (ushort) (m))
#define HALF(bits)        ((float) as_type<half>((ushort) (bits)))
#define FLOAT(bits)       as_type<float>((uint) (bits))
#define EXP(x)            exp(x)
#define UNROLL            _Pragma("clang loop unroll(full)")
#else
#define FN   static __device__ __forceinline__
#define ARGS const attn_span_args
#define GLOBAL
#define SHARED
#define LOCAL
#define BARRIER()         __syncthreads()
#define SHUFFLE_XOR(x, m) __shfl_xor_sync(0xffffffff, x, m, 32)
#define HALF(bits)        __half2float(__ushort_as_half((unsigned short) (bits)))
#define FLOAT(bits)       __uint_as_float(bits)
#define EXP(x)            expf(x)
#define UNROLL            _Pragma("unroll")
#endif

// Logit of a hidden cell, and maximum of a query that sees none. Finite: fast math may not know infinities.
#define HIDDEN (-1e38f)

// --- K rows, eight numbers at a time ---

// Which element of its row the i-th number of a unit is: 4 and 5 bit blocks hold low nibbles 16 elements before high ones.
template <int TYPE> FN int attn_span_element(int unit, int i) {
    return TYPE < ATTN_SPAN_Q4_0 ? 8 * unit + i : 32 * (unit / 4) + 4 * (unit % 4) + i % 4 + 16 * (i / 4);
}

// Blocks of quantized rows are an odd number of 16-bit words, so nothing wider can be read from them.
template <int TYPE> FN void attn_span_unit(GLOBAL const char * row, int unit, LOCAL float * x) {
    if (TYPE == ATTN_SPAN_F32) {
        const float4 a = ((GLOBAL const float4 *) row)[2 * unit];
        const float4 b = ((GLOBAL const float4 *) row)[2 * unit + 1];

        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else if (TYPE == ATTN_SPAN_F16 || TYPE == ATTN_SPAN_BF16) {
        const uint4    v    = ((GLOBAL const uint4 *) row)[unit];
        const uint32_t w[4] = { v.x, v.y, v.z, v.w };

        UNROLL for (int i = 0; i < 4; ++i) {
            x[2 * i]     = TYPE == ATTN_SPAN_F16 ? HALF(w[i] & 0xffff) : FLOAT(w[i] << 16);
            x[2 * i + 1] = TYPE == ATTN_SPAN_F16 ? HALF(w[i] >> 16) : FLOAT(w[i] & 0xffff0000);
        }
    } else if (TYPE == ATTN_SPAN_Q8_0) {
        GLOBAL const uint16_t * w = (GLOBAL const uint16_t *) row + 17 * (unit / 4);
        GLOBAL const uint16_t * v = w + 1 + 4 * (unit % 4);
        const float             d = HALF(w[0]);

        UNROLL for (int i = 0; i < 4; ++i) {
            x[2 * i]     = d * (float) (int8_t) (v[i] & 0xff);
            x[2 * i + 1] = d * (float) (int8_t) (v[i] >> 8);
        }
    } else {
        const bool has_min  = TYPE == ATTN_SPAN_Q4_1 || TYPE == ATTN_SPAN_Q5_1;
        const bool has_high = TYPE == ATTN_SPAN_Q5_0 || TYPE == ATTN_SPAN_Q5_1;
        const int  at_high  = has_min ? 2 : 1;               // words before the fifth bits
        const int  at_low   = at_high + (has_high ? 2 : 0);  // words before the nibbles
        const int  part     = unit % 4;

        GLOBAL const uint16_t * w = (GLOBAL const uint16_t *) row + (at_low + 8) * (unit / 4);
        GLOBAL const uint16_t * v = w + at_low + 2 * part;

        const uint32_t low  = v[0] | (uint32_t) v[1] << 16;
        const uint32_t high = has_high ? (w[at_high] | (uint32_t) w[at_high + 1] << 16) >> (4 * part) : 0;
        const float    d    = HALF(w[0]);
        const float    base = has_min ? HALF(w[1]) : d * (has_high ? -16.0f : -8.0f);

        UNROLL for (int i = 0; i < 4; ++i) {
            x[i]     = d * (float) ((low >> (8 * i) & 0xf) | (high >> i & 1) << 4) + base;
            x[i + 4] = d * (float) ((low >> (8 * i + 4) & 0xf) | (high >> (i + 16) & 1) << 4) + base;
        }
    }
}

// --- sums ---

// Lanes exchange one half of their 2*N values for their share of the other.
template <int N> FN void attn_span_fold(LOCAL float * v, int lane) {
    const bool upper = lane & N;

    UNROLL for (int i = 0; i < N; ++i) {
        const float other = SHUFFLE_XOR(upper ? v[i] : v[i + N], N);
        v[i]              = (upper ? v[i + N] : v[i]) + other;
    }
}

// Joins the maxima m and the sums s of exp(x - m) of two sets.
FN void attn_span_merge(LOCAL float & m, LOCAL float & s, float m2, float s2) {
    const float top = m > m2 ? m : m2;

    s = s * EXP(m - top) + s2 * EXP(m2 - top);
    m = top;
}

FN void attn_span_merge_lane(LOCAL float & m, LOCAL float & s, int distance) {
    const float m2 = SHUFFLE_XOR(m, distance);
    const float s2 = SHUFFLE_XOR(s, distance);

    attn_span_merge(m, s, m2, s2);
}

// --- kernels ---

// Threadgroup (split, tile, hk) of ATTN_SPAN_LOGITS_WARPS warps: NQ (1, 4 or 8) queries of KV head hk.
//   logits [n_query][n_kv], part [n_query][n_split] (maximum, sum), shared [warps * NQ]
template <int TYPE, int NQ>
FN void attn_span_logits(
        ARGS & a, GLOBAL const char * q, GLOBAL const char * k, GLOBAL const char * mask, GLOBAL float * logits,
        GLOBAL float2 * part, SHARED float2 * shared, int split, int tile, int hk, int warp, int lane) {
    const int NC = 8 / NQ;  // cells of a lane: each keeps 8 sums

    const int n_head = a.n_rep * a.n_row;  // queries of a KV head, numbered head-first
    const int n_unit = a.d / 8;
    const int unit   = lane % a.lanes;  // what the lane reads of a row
    const int sub    = lane / a.lanes;  // and of which of the rows that a warp reads at once
    const int n_sub  = 32 / a.lanes;
    const int n_pass = n_sub * NC;  // cells that a warp takes at once
    const int begin  = split * a.chunk;
    const int end    = begin + a.chunk < a.n_kv ? begin + a.chunk : a.n_kv;

    float x_q[NQ][8];
    UNROLL for (int n = 0; n < NQ; ++n) {
        const int  query = tile * NQ + n;
        const bool some  = query < n_head && unit < n_unit;
        const int  head  = hk * a.n_rep + (some ? query % a.n_rep : 0);

        GLOBAL const char *  at  = q + (some ? query / a.n_rep : 0) * a.q_row + head * a.q_head;
        GLOBAL const float * row = (GLOBAL const float *) at;
        UNROLL for (int i = 0; i < 8; ++i) {
            x_q[n][i] = some ? a.scale * row[attn_span_element<TYPE>(unit, i)] : 0.0f;
        }
    }

    // of its 8 sums a lane will keep one whole: that of this query and of this cell in a pass
    const int  query  = tile * NQ + lane % NQ;
    const int  cell_0 = lane % 8 / NQ * n_sub + sub;
    const bool mine   = unit < 8 && query < n_head;

    mask += (mine ? query / a.n_rep : 0) * a.mask_row;
    k += hk * a.k_head;
    logits += (mine ? hk * n_head + query : 0) * a.n_kv;

    float m = HIDDEN;
    float s = 0.0f;

    for (int c = begin + warp * n_pass; c < end; c += ATTN_SPAN_LOGITS_WARPS * n_pass) {
        const int  cell    = c + cell_0;
        const bool present = mine && cell < end;

        float bias = HIDDEN;
        if (present) {
            bias = a.mask_f16 ? HALF(((GLOBAL const uint16_t *) mask)[cell]) : ((GLOBAL const float *) mask)[cell];
        }

        // lanes past the row or the chunk read its last: no branch holds back the loads
        float x_k[NC][8];
        UNROLL for (int i = 0; i < NC; ++i) {
            const int at = c + i * n_sub + sub < end ? c + i * n_sub + sub : end - 1;
            attn_span_unit<TYPE>(k + at * a.k_cell, unit < n_unit ? unit : n_unit - 1, x_k[i]);
        }

        float dot[8];
        UNROLL for (int i = 0; i < 8; ++i) {
            dot[i] = 0.0f;
            UNROLL for (int j = 0; j < 8; ++j) { dot[i] += x_q[i % NQ][j] * x_k[i / NQ][j]; }
        }
        attn_span_fold<4>(dot, lane);
        attn_span_fold<2>(dot, lane);
        attn_span_fold<1>(dot, lane);
        for (int i = 8; i < a.lanes; i *= 2) {
            dot[0] += SHUFFLE_XOR(dot[0], i);
        }

        if (present) {
            const bool  visible = bias > HIDDEN;  // what a hidden cell holds may be no number
            const float logit   = visible ? dot[0] + bias : HIDDEN;

            logits[cell] = logit;
            attn_span_merge(m, s, logit, visible ? 1.0f : 0.0f);
        }
    }

    // lanes of the same query, then warps
    for (int i = NQ; i < 8; i *= 2) {
        attn_span_merge_lane(m, s, i);
    }
    for (int i = a.lanes; i < 32; i *= 2) {
        attn_span_merge_lane(m, s, i);
    }
    if (lane < NQ) {
        shared[warp * NQ + lane].x = m;
        shared[warp * NQ + lane].y = s;
    }
    BARRIER();

    if (warp == 0 && lane < NQ && query < n_head) {
        for (int i = 1; i < ATTN_SPAN_LOGITS_WARPS; ++i) {
            attn_span_merge(m, s, shared[i * NQ + lane].x, shared[i * NQ + lane].y);
        }
        GLOBAL float2 * out = part + (hk * n_head + query) * a.n_split + split;

        out->x = m;
        out->y = s;
    }
}

// Threadgroup block of ATTN_SPAN_REDUCE_WARPS warps: the 32 cells ids[32 * block ...], each by one lane of all warps.
//   shared [warps * 32]
FN void attn_span_reduce(
        ARGS & a, GLOBAL const float * logits, GLOBAL const float2 * part, GLOBAL const int32_t * ids,
        GLOBAL float * dst, SHARED float2 * shared, int block, int warp, int lane) {
    const int n_thread = 32 * ATTN_SPAN_REDUCE_WARPS;
    const int self     = 32 * warp + lane;
    const int at       = 32 * block + lane;
    const int cell     = at < a.n_span ? ids[at] : 0;
    const int n_pass   = n_thread / a.merge;  // queries at once

    float acc = 0.0f;

    for (int q0 = 0; q0 < a.n_query; q0 += n_pass) {
        const int query = q0 + self / a.merge;

        float m = HIDDEN;
        float s = 0.0f;
        if (query < a.n_query) {
            for (int i = self % a.merge; i < a.n_split; i += a.merge) {
                const float2 p = part[query * a.n_split + i];
                attn_span_merge(m, s, p.x, p.y);
            }
        }
        for (int i = 1; i < a.merge; i *= 2) {
            attn_span_merge_lane(m, s, i);
        }
        if (self % a.merge == 0) {
            shared[self / a.merge].x = m;
            shared[self / a.merge].y = s > 0.0f ? 1.0f / s : 0.0f;  // 0: the query sees no cell
        }
        BARRIER();

        const int n = a.n_query - q0 < n_pass ? a.n_query - q0 : n_pass;
        for (int i = warp; i < n; i += ATTN_SPAN_REDUCE_WARPS) {
            const float p = EXP(logits[(q0 + i) * a.n_kv + cell] - shared[i].x) * shared[i].y;
            acc           = a.is_max ? (acc > p ? acc : p) : acc + p;
        }
        BARRIER();
    }

    shared[self].x = acc;
    BARRIER();

    if (warp == 0 && at < a.n_span) {
        for (int i = 1; i < ATTN_SPAN_REDUCE_WARPS; ++i) {
            const float p = shared[32 * i + lane].x;
            acc           = a.is_max ? (acc > p ? acc : p) : acc + p;
        }
        acc *= a.share;
        if (!a.first) {
            acc = a.is_max ? (acc > dst[at] ? acc : dst[at]) : acc + dst[at];
        }
        dst[at] = acc;
    }
}

#undef FN
#undef ARGS
#undef GLOBAL
#undef SHARED
#undef LOCAL
#undef BARRIER
#undef SHUFFLE_XOR
#undef HALF
#undef FLOAT
#undef EXP
#undef UNROLL
#undef HIDDEN
