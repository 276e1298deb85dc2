// run_cuda.cpp - runs attn-span.cu on the cases from stdin.
#include "attn-span.cu"
#include "case.h"

float2 attn_span_shared[48 * 1024 / sizeof(float2)];

int main() {
    shared_memory = (char *) attn_span_shared;
    shared_size   = sizeof(attn_span_shared);

    for (test_case c; c.read();) {
        test_op                   op(c);
        ggml_backend_cuda_context ctx;

        ggml_cuda_info().devices[0].nsm = (int) c.n_sm;
        op.run([&](ggml_tensor * dst) { ggml_cuda_attn_span(ctx, dst); });
    }
}
