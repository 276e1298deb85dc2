// attn-span-cpu.h - GGML_OP_ATTN_SPAN on the CPU backend.
#pragma once

#include "ggml.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Bytes of work buffer that n_tasks threads need together.
size_t ggml_attn_span_cpu_work_size(const struct ggml_tensor * dst, int n_tasks);

void ggml_compute_forward_attn_span(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
