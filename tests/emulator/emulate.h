// emulate.h - the op ATTN_SPAN as a GPU backend computes it: its kernels' and its host's own text, on emulated lanes.
#pragma once

#include "ggml.h"

#include <stddef.h>

extern "C" {

struct emulated_op {
    bool (*supports)(const ggml_tensor * op);
    size_t (*extra)(const ggml_tensor * op);  // bytes of memory that the result needs besides its own
    void (*compute)(ggml_tensor * op, int n_sm, unsigned seed);  // seed: of the order in which lanes run
};

// Of the backend that this is compiled for: emulate_cuda.cpp or emulate_metal.cpp.
const emulated_op * emulated_attn_span(void);
}
