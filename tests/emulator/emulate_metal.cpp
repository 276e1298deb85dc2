// emulate_metal.cpp - attn-span.metal, as its host in attn-span-metal.cpp asks for it, on lanes.
#include "attn-span-metal.cpp"
#include "emulate.h"
#include "lanes.h"
#include "metal/kernels.h"

#include <array>

// --- the backend: what attn-span-metal.cpp calls ---

struct ggml_metal_pipeline {
    metal_kernel kernel;
};

// A dispatch, with a copy of its arguments.
struct call {
    metal_kernel          kernel;
    std::vector<char>     arguments;
    std::array<void *, 8> buffers;
    size_t                n_shared;
    int                   grid[3];
    int                   n_thread;
};

// Dispatches wait until a barrier, and then run newest first: nothing but a barrier orders them.
struct ggml_metal_encoder {
    call              next;
    std::vector<call> waiting;

    void flush() {
        for (; !waiting.empty(); waiting.pop_back()) {
            call & c     = waiting.back();
            c.buffers[0] = c.arguments.data();
            for (int g : lanes::shuffled(c.grid[0] * c.grid[1] * c.grid[2])) {
                lanes::fresh<char> shared(c.n_shared);
                const int          x = g % c.grid[0], y = g / c.grid[0] % c.grid[1], z = g / c.grid[0] / c.grid[1];

                lanes::run_group(c.n_thread, [&](int i) {
                    c.kernel(c.buffers.data(), shared.data, x, y, z, i / lanes::WARP, i % lanes::WARP);
                });
            }
        }
    }
};

static ggml_metal_pipeline pipeline;

extern "C" {

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t, const char *) {
    return {};  // none is compiled yet
}

ggml_metal_pipeline_with_params
ggml_metal_library_compile_pipeline(ggml_metal_library_t, const char * base, const char *, ggml_metal_cv_t) {
    const auto found = metal_kernels.find(base);
    if (found == metal_kernels.end()) {
        lanes::fail(base, 0);
    }
    pipeline.kernel = found->second;

    ggml_metal_pipeline_with_params result = {};
    result.pipeline                        = &pipeline;
    return result;
}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) { return 1024; }

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params p) {
    enc->next = { p.pipeline->kernel, {}, {}, 0, {}, 0 };
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    GGML_ASSERT(idx == 0);
    enc->next.arguments.assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id id, int idx) {
    enc->next.buffers.at(idx) = (char *) id.metal + id.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int idx) {
    GGML_ASSERT(size % 16 == 0 && size <= 32 * 1024 && idx == 0);
    enc->next.n_shared = size;
}

void ggml_metal_encoder_dispatch_threadgroups(
        ggml_metal_encoder_t enc, int g0, int g1, int g2, int t0, int t1, int t2) {
    GGML_ASSERT(t0 == lanes::WARP && t2 == 1);
    enc->next.grid[0]  = g0;
    enc->next.grid[1]  = g1;
    enc->next.grid[2]  = g2;
    enc->next.n_thread = t0 * t1;
    enc->waiting.push_back(enc->next);
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) { enc->flush(); }

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const ggml_tensor * t) { return { t->data, 0 }; }
}

static void compute(ggml_tensor * op, int, unsigned seed) {
    ggml_metal_encoder enc;

    lanes::rng.seed(seed);
    ggml_metal_attn_span(nullptr, &enc, op);
    enc.flush();
}

const emulated_op * emulated_attn_span(void) {
    static const emulated_op op = { ggml_attn_span_gpu_supports, ggml_metal_attn_span_extra, compute };
    return &op;
}
