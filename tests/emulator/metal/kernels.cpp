#include "kernels.h"

#define __METAL_VERSION__ 310
#include "kernels/attn_span.metal"

template <logits_t * f> static void run_logits(void ** b, void * shared, int x, int y, int z, int warp, int lane) {
    f(*(attn_span_args *) b[0], (char *) b[1], (char *) b[2], (char *) b[3], (float *) b[4], (float2 *) b[5],
      (float2 *) shared, { uint(x), uint(y), uint(z) }, warp, lane);
}

static void run_reduce(void ** b, void * shared, int x, int y, int z, int warp, int lane) {
    kernel_attn_span_reduce(
            *(attn_span_args *) b[0], (float *) b[1], (float2 *) b[2], (int32_t *) b[3], (float *) b[4],
            (float2 *) shared, { uint(x), uint(y), uint(z) }, warp, lane);
}

const std::map<std::string, metal_kernel> metal_kernels = {
#include "instances.inc"  // made of the host names in the text: { "name", run_logits<instance> },
    {"kernel_attn_span_reduce", run_reduce},
};
