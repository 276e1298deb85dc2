// emulate_cuda.cpp - attn-span.cu, on lanes.
#include "attn-span.cu"
#include "emulate.h"

float2 attn_span_shared[48 * 1024 / sizeof(float2)];

static size_t extra(const ggml_tensor *) { return 0; }

static void compute(ggml_tensor * op, int n_sm, unsigned seed) {
    ggml_backend_cuda_context ctx;

    lanes::rng.seed(seed);
    shared_memory                   = (char *) attn_span_shared;
    shared_size                     = sizeof(attn_span_shared);
    ggml_cuda_info().devices[0].nsm = n_sm;
    ggml_cuda_attn_span(ctx, op);
}

const emulated_op * emulated_attn_span(void) {
    static const emulated_op op = { ggml_attn_span_gpu_supports, extra, compute };
    return &op;
}
