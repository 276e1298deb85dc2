// attn-span-cuda.h - GGML_OP_ATTN_SPAN on the CUDA backend, and on HIP's and MUSA's, which are built from its sources.
#pragma once

struct ggml_backend_cuda_context;
struct ggml_tensor;

void ggml_cuda_attn_span(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
