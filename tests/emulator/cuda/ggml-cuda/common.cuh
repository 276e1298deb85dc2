// common.cuh - stands in for upstream's file of this name: as much of CUDA and of the backend as attn-span.cu uses.
#pragma once

#include "ggml-impl.h"
#include "lanes.h"

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(n)

struct alignas(8) float2 {
    float x, y;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

struct dim3 {
    int x, y, z;

    dim3(int x, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};

struct half {
    uint16_t bits;
};

inline dim3 blockIdx(0), threadIdx(0);

inline half __ushort_as_half(uint16_t bits) { return { bits }; }

inline float __half2float(half x) { return ggml_compute_fp16_to_fp32(x.bits); }

inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

inline void __syncthreads(int site = __builtin_LINE()) {
    lanes::barrier(site);
    threadIdx.x = lanes::now;
}

template <typename T> T __shfl_xor_sync(uint32_t mask, T x, int distance, int width, int site = __builtin_LINE()) {
    if (mask != 0xffffffff || width != lanes::WARP) {
        lanes::fail("a shuffle of part of a warp", site);
    }
    x           = lanes::shuffle_xor(x, distance, site);
    threadIdx.x = lanes::now;
    return x;
}

// --- the backend ---

using cudaStream_t = void *;

struct ggml_cuda_pool {};

template <typename T> struct ggml_cuda_pool_alloc {
    lanes::fresh<T> memory;

    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t n) : memory(n) {}

    T * get() { return memory.data; }
};

struct ggml_backend_cuda_context {
    int            device = 0;
    ggml_cuda_pool the_pool;

    ggml_cuda_pool & pool() { return the_pool; }
    cudaStream_t     stream() { return nullptr; }
};

struct ggml_cuda_device_info {
    struct {
        int nsm;
    } devices[1];
};

inline ggml_cuda_device_info & ggml_cuda_info() {
    static ggml_cuda_device_info info;
    return info;
}

inline void ggml_cuda_pdl_sync() {}

inline void ggml_cuda_pdl_lc() {}

struct ggml_cuda_kernel_launch_params {
    dim3   grid, block;
    size_t n_shared;

    ggml_cuda_kernel_launch_params(dim3 grid, dim3 block, size_t n_shared, cudaStream_t) :
        grid(grid),
        block(block),
        n_shared(n_shared) {}
};

inline char * shared_memory;  // the kernels' array, and its size
inline size_t shared_size;

template <typename... Params, typename... Args>
void ggml_cuda_kernel_launch(void (*kernel)(Params...), const ggml_cuda_kernel_launch_params & p, Args... args) {
    const dim3 g = p.grid;

    if (g.y > 65535 || g.z > 65535) {
        lanes::fail("a grid beyond its limits", 0);
    }
    for (int group : lanes::shuffled(g.x * g.y * g.z)) {
        blockIdx = dim3(group % g.x, group / g.x % g.y, group / g.x / g.y);
        memset(shared_memory, 0xff, shared_size);
        ASAN_POISON_MEMORY_REGION(shared_memory + p.n_shared, shared_size - p.n_shared);
        lanes::run_group(p.block.x, [&](int thread) {
            threadIdx.x = thread;
            kernel(args...);
        });
        ASAN_UNPOISON_MEMORY_REGION(shared_memory, shared_size);
    }
}
