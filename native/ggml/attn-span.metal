#include "common.h"

#include "attn-span-kernel.h"

template <int TYPE, int TILE>
kernel void kernel_attn_span_logits(
        constant attn_span_args & args, device const char * q, device const char * k, device const char * mask,
        device float * logits, device float2 * part, threadgroup float2 * shared [[threadgroup(0)]],
        uint3 group [[threadgroup_position_in_grid]], ushort warp [[simdgroup_index_in_threadgroup]],
        ushort lane [[thread_index_in_simdgroup]]) {
    attn_span_logits<TYPE, TILE>(args, q, k, mask, logits, part, shared, group.x, group.y, group.z, warp, lane);
}

kernel void kernel_attn_span_reduce(
        constant attn_span_args & args, device const float * logits, device const float2 * part,
        device const int32_t * ids, device float * dst, threadgroup float2 * shared [[threadgroup(0)]],
        uint3 group [[threadgroup_position_in_grid]], ushort warp [[simdgroup_index_in_threadgroup]],
        ushort lane [[thread_index_in_simdgroup]]) {
    attn_span_reduce(args, logits, part, ids, dst, shared, group.x, warp, lane);
}

typedef decltype(kernel_attn_span_logits<ATTN_SPAN_F32, 1>) logits_t;

template [[host_name("kernel_attn_span_logits_f32_1")]]  kernel logits_t kernel_attn_span_logits<ATTN_SPAN_F32, 1>;
template [[host_name("kernel_attn_span_logits_f32_4")]]  kernel logits_t kernel_attn_span_logits<ATTN_SPAN_F32, 4>;
template [[host_name("kernel_attn_span_logits_f32_8")]]  kernel logits_t kernel_attn_span_logits<ATTN_SPAN_F32, 8>;
template [[host_name("kernel_attn_span_logits_f16_1")]]  kernel logits_t kernel_attn_span_logits<ATTN_SPAN_F16, 1>;
template [[host_name("kernel_attn_span_logits_f16_4")]]  kernel logits_t kernel_attn_span_logits<ATTN_SPAN_F16, 4>;
template [[host_name("kernel_attn_span_logits_f16_8")]]  kernel logits_t kernel_attn_span_logits<ATTN_SPAN_F16, 8>;
template [[host_name("kernel_attn_span_logits_bf16_1")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_BF16, 1>;
template [[host_name("kernel_attn_span_logits_bf16_4")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_BF16, 4>;
template [[host_name("kernel_attn_span_logits_bf16_8")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_BF16, 8>;
template [[host_name("kernel_attn_span_logits_q8_0_1")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q8_0, 1>;
template [[host_name("kernel_attn_span_logits_q8_0_4")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q8_0, 4>;
template [[host_name("kernel_attn_span_logits_q8_0_8")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q8_0, 8>;
template [[host_name("kernel_attn_span_logits_q4_0_1")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q4_0, 1>;
template [[host_name("kernel_attn_span_logits_q4_0_4")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q4_0, 4>;
template [[host_name("kernel_attn_span_logits_q4_0_8")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q4_0, 8>;
template [[host_name("kernel_attn_span_logits_q4_1_1")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q4_1, 1>;
template [[host_name("kernel_attn_span_logits_q4_1_4")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q4_1, 4>;
template [[host_name("kernel_attn_span_logits_q4_1_8")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q4_1, 8>;
template [[host_name("kernel_attn_span_logits_q5_0_1")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q5_0, 1>;
template [[host_name("kernel_attn_span_logits_q5_0_4")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q5_0, 4>;
template [[host_name("kernel_attn_span_logits_q5_0_8")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q5_0, 8>;
template [[host_name("kernel_attn_span_logits_q5_1_1")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q5_1, 1>;
template [[host_name("kernel_attn_span_logits_q5_1_4")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q5_1, 4>;
template [[host_name("kernel_attn_span_logits_q5_1_8")]] kernel logits_t kernel_attn_span_logits<ATTN_SPAN_Q5_1, 8>;
