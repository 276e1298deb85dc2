#include "attn-span-cuda.h"

#include "attn-span-gpu.h"
#include "ggml-cuda/common.cuh"

#include "attn-span-kernel.h"

static constexpr int LOGITS_THREADS = 32 * ATTN_SPAN_LOGITS_WARPS;
static constexpr int REDUCE_THREADS = 32 * ATTN_SPAN_REDUCE_WARPS;
static constexpr int BLOCKS_PER_SM  = 4;  // enough loads under way to keep the memory busy

extern __shared__ float2 attn_span_shared[];

template <int TYPE, int TILE>
static __global__ void __launch_bounds__(LOGITS_THREADS) attn_span_logits_kernel(
        const attn_span_args args, const char * q, const char * k, const char * mask, float * logits, float2 * part) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    attn_span_logits<TYPE, TILE>(
            args, q, k, mask, logits, part, attn_span_shared, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x / 32,
            threadIdx.x % 32);
}

static __global__ void __launch_bounds__(REDUCE_THREADS) attn_span_reduce_kernel(
        const attn_span_args args, const float * logits, const float2 * part, const int32_t * ids, float * dst) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    attn_span_reduce(args, logits, part, ids, dst, attn_span_shared, blockIdx.x, threadIdx.x / 32, threadIdx.x % 32);
}

using logits_kernel_t = decltype(&attn_span_logits_kernel<ATTN_SPAN_F32, 1>);

template <int TYPE> static logits_kernel_t logits_kernel(int tile) {
    return tile == 1 ? attn_span_logits_kernel<TYPE, 1> :
           tile == 4 ? attn_span_logits_kernel<TYPE, 4> :
                       attn_span_logits_kernel<TYPE, 8>;
}

static logits_kernel_t logits_kernel(int type, int tile) {
    switch (type) {
        case ATTN_SPAN_F32: return logits_kernel<ATTN_SPAN_F32>(tile);
        case ATTN_SPAN_F16: return logits_kernel<ATTN_SPAN_F16>(tile);
        case ATTN_SPAN_BF16: return logits_kernel<ATTN_SPAN_BF16>(tile);
        case ATTN_SPAN_Q8_0: return logits_kernel<ATTN_SPAN_Q8_0>(tile);
        case ATTN_SPAN_Q4_0: return logits_kernel<ATTN_SPAN_Q4_0>(tile);
        case ATTN_SPAN_Q4_1: return logits_kernel<ATTN_SPAN_Q4_1>(tile);
        case ATTN_SPAN_Q5_0: return logits_kernel<ATTN_SPAN_Q5_0>(tile);
        case ATTN_SPAN_Q5_1: return logits_kernel<ATTN_SPAN_Q5_1>(tile);
        default: GGML_ABORT("attn_span: K of this type is not supported");
    }
}

void ggml_cuda_attn_span(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const char *    q    = (const char *) dst->src[0]->data;
    const char *    k    = (const char *) dst->src[1]->data;
    const char *    mask = (const char *) dst->src[2]->data;
    const int32_t * ids  = (const int32_t *) dst->src[3]->data;

    const int  n_fill = BLOCKS_PER_SM * ggml_cuda_info().devices[ctx.device].nsm;
    const auto plan   = ggml_attn_span_gpu_plan(dst, n_fill);

    ggml_cuda_pool_alloc<float>  logits(ctx.pool(), plan.n_logits);
    ggml_cuda_pool_alloc<float2> part(ctx.pool(), plan.n_part);

    for (int row = 0; row < plan.n_q; row += plan.rows_per_group) {
        const auto group = ggml_attn_span_gpu_group(&plan, row);

        ggml_cuda_kernel_launch(
                logits_kernel(plan.type, plan.tile),
                ggml_cuda_kernel_launch_params(
                        dim3(group.args.n_split, group.n_tile, plan.n_head_kv), dim3(LOGITS_THREADS),
                        sizeof(float2) * ATTN_SPAN_LOGITS_WARPS * plan.tile, ctx.stream()),
                group.args, q + group.q_offset, k, mask + group.mask_offset, logits.get(), part.get());

        ggml_cuda_kernel_launch(
                attn_span_reduce_kernel,
                ggml_cuda_kernel_launch_params(
                        dim3(group.n_block), dim3(REDUCE_THREADS), sizeof(float2) * REDUCE_THREADS, ctx.stream()),
                group.args, (const float *) logits.get(), (const float2 *) part.get(), ids, (float *) dst->data);
    }
}
