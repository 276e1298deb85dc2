// attn-span-metal.h - GGML_OP_ATTN_SPAN on the Metal backend.
#pragma once

#include "ggml-metal/ggml-metal-device.h"  // as from ggml/src, where that target looks

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of scratch memory that follow the result.
size_t ggml_metal_attn_span_extra(const struct ggml_tensor * op);

void ggml_metal_attn_span(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
