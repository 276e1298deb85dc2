// st3-stop.cpp - llama.cpp's and mtmd's callbacks that end work which another thread no longer wants.

#include <cstring>

#include "ggml.h"
#include "st3.h"
#include "vision/st3-vision.h"

static bool is_set(const void * flag) { return *static_cast<const volatile bool *>(flag); }

bool st3_stop_compute(void * flag) { return is_set(flag); }

bool st3_stop_load(float, void * flag) { return !is_set(flag); }

// The scheduler computes up to a node that is asked for: once a layer is often enough, and costs nothing.
bool st3_stop_encode(ggml_tensor * t, bool ask, void * flag) {
    const bool ours = t->op == GGML_OP_CUSTOM && std::strcmp(t->name, ST3_VISION_ATTENTION) == 0;
    return ask ? ours || t->op == GGML_OP_FLASH_ATTN_EXT || t->op == GGML_OP_SOFT_MAX : !is_set(flag);
}
