// hip_runtime.cpp - HIP without a GPU, under ggml-cuda's own host code: memory is the host's, copies are made at once,
// kernels do nothing. What they would have computed the CPU backend computes before. This shows that ggml-cuda takes every op
// of a graph, what it asks of the runtime, and which decode steps are replays of a captured graph.
#include "device.h"
#include "ggml-backend-impl.h"
#include "ggml-cuda.h"
#include "ggml-cuda/vendors/hip.h"
#include "ggml-impl.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace {

device_counts counts;
bool          computed;   // the graph under way: what is left on the device may not be changed
bool          capturing;  // the host may not wait, nor copy

ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char *);
ggml_status (*graph_compute)(ggml_backend_t, ggml_cgraph *);

ggml_backend_t cpu() {
    static ggml_backend_t res = ggml_backend_dev_init(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), nullptr);
    return res;
}

hipError_t wait() {
    GGML_ASSERT(!capturing);
    counts.waits++;
    return hipSuccess;
}

hipError_t copy(void * dst, const void * src, size_t n, hipMemcpyKind kind) {
    if (kind == hipMemcpyDeviceToDevice && computed) {
        return hipSuccess;
    }
    GGML_ASSERT(!capturing);
    counts.bytes_in += kind == hipMemcpyHostToDevice ? n : 0;
    counts.bytes_out += kind == hipMemcpyDeviceToHost ? n : 0;
    memcpy(dst, src, n);
    return hipSuccess;
}

hipError_t launch() {
    counts.kernels++;
    return hipSuccess;
}

hipError_t allocate(void ** data, size_t n) {
    *data = aligned_alloc(256, GGML_PAD(n, 256) + 256);
    return *data ? hipSuccess : hipErrorOutOfMemory;
}

template <typename T> hipError_t give(T * out, T value) {
    *out = value;
    return hipSuccess;
}

template <typename T> hipError_t some_handle(T * out) {
    static char it;
    return give(out, (T) &it);
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    counts.graphs++;
    ggml_status res = ggml_backend_graph_compute(cpu(), graph);
    if (res == GGML_STATUS_SUCCESS) {
        computed = true;
        res      = graph_compute(backend, graph);
        computed = false;
    }
    return res;
}

}  // namespace

void device_register(const char *) {
    ggml_backend_reg_t reg = ggml_backend_cuda_reg();
    ggml_backend_dev_t dev = ggml_backend_reg_dev_get(reg, 0);

    ggml_backend_register(reg);
    init_backend            = dev->iface.init_backend;
    dev->iface.init_backend = [](ggml_backend_dev_t device, const char * params) {
        ggml_backend_t res = init_backend(device, params);
        graph_compute      = std::exchange(res->iface.graph_compute, compute);
        return res;
    };
}

device_counts device_take(void) { return std::exchange(counts, device_counts{}); }

// --- what ggml-cuda calls ---

extern "C" {

// the device

hipError_t hipGetDeviceCount(int * n) { return give(n, 1); }

hipError_t hipGetDevice(int * device) { return give(device, 0); }

hipError_t hipSetDevice(int) { return hipSuccess; }

hipError_t hipGetDeviceProperties(hipDeviceProp_t * p, int) {
    *p                     = {};
    p->warpSize            = 32;
    p->multiProcessorCount = 72;
    p->sharedMemPerBlock   = 64 * 1024;
    p->maxThreadsPerBlock  = 1024;
    p->totalGlobalMem      = size_t(8) << 30;
    strcpy(p->name, "no GPU");
    strcpy(p->gcnArchName, "gfx1030");
    return hipSuccess;
}

hipError_t hipDeviceGetAttribute(int * value, hipDeviceAttribute_t, int) { return give(value, 1); }

hipError_t hipDeviceGetPCIBusId(char * id, int n, int) {
    snprintf(id, n, "0000:00:00.0");
    return hipSuccess;
}

hipError_t hipMemGetInfo(size_t * free, size_t * total) { return give(free, *total = size_t(8) << 30); }

hipError_t hipDeviceCanAccessPeer(int * can, int, int) { return give(can, 0); }

hipError_t hipDeviceEnablePeerAccess(int, unsigned) { return hipSuccess; }

hipError_t hipGetLastError() { return hipSuccess; }

const char * hipGetErrorString(hipError_t) { return "an error of hip_runtime.cpp"; }

// memory

hipError_t hipMalloc(void ** data, size_t n) {
    const hipError_t res = allocate(data, n);
    if (res == hipSuccess) {
        memset(*data, 0xff, n);  // no number
    }
    return res;
}

hipError_t hipMallocManaged(void ** data, size_t n, unsigned) { return hipMalloc(data, n); }

hipError_t hipHostMalloc(void ** data, size_t n, unsigned) { return allocate(data, n); }

hipError_t hipFree(void * data) {
    free(data);
    return hipSuccess;
}

hipError_t hipHostFree(void * data) { return hipFree(data); }

hipError_t hipHostGetDevicePointer(void ** device, void * host, unsigned) { return give(device, host); }

hipError_t hipHostRegister(void *, size_t, unsigned) { return hipSuccess; }

hipError_t hipHostUnregister(void *) { return hipSuccess; }

hipError_t hipMemAdvise(const void *, size_t, hipMemoryAdvise, int) { return hipSuccess; }

hipError_t hipMemcpyAsync(void * dst, const void * src, size_t n, hipMemcpyKind kind, hipStream_t) {
    return copy(dst, src, n, kind);
}

hipError_t hipMemcpyPeerAsync(void * dst, int, const void * src, int, size_t n, hipStream_t) {
    return copy(dst, src, n, hipMemcpyDeviceToDevice);
}

hipError_t hipMemcpy2DAsync(
        void * dst, size_t dst_row, const void * src, size_t src_row, size_t width, size_t height, hipMemcpyKind kind,
        hipStream_t) {
    for (size_t i = 0; i < height; ++i) {
        copy((char *) dst + i * dst_row, (const char *) src + i * src_row, width, kind);
    }
    return hipSuccess;
}

hipError_t hipMemset(void * dst, int value, size_t n) {
    if (!computed) {
        memset(dst, value, n);
    }
    return hipSuccess;
}

hipError_t hipMemsetAsync(void * dst, int value, size_t n, hipStream_t) { return hipMemset(dst, value, n); }

// streams and events

hipError_t hipStreamCreateWithFlags(hipStream_t * stream, unsigned) { return some_handle(stream); }

hipError_t hipStreamDestroy(hipStream_t) { return hipSuccess; }

hipError_t hipStreamSynchronize(hipStream_t) { return wait(); }

hipError_t hipStreamWaitEvent(hipStream_t, hipEvent_t, unsigned) { return hipSuccess; }

hipError_t hipDeviceSynchronize() { return wait(); }

hipError_t hipEventCreateWithFlags(hipEvent_t * event, unsigned) { return some_handle(event); }

hipError_t hipEventDestroy(hipEvent_t) { return hipSuccess; }

hipError_t hipEventRecord(hipEvent_t, hipStream_t) { return hipSuccess; }

hipError_t hipEventSynchronize(hipEvent_t) { return wait(); }

// kernels, and graphs of them

hipError_t hipLaunchKernel(const void *, dim3, dim3, void **, size_t, hipStream_t) { return launch(); }

hipError_t hipLaunchCooperativeKernel(const void *, dim3, dim3, void **, unsigned, hipStream_t) { return launch(); }

hipError_t hipFuncSetAttribute(const void *, hipFuncAttribute, int) { return hipSuccess; }

hipError_t hipOccupancyMaxActiveBlocksPerMultiprocessor(int * n, const void *, int, size_t) { return give(n, 2); }

hipError_t __hipPushCallConfiguration(dim3, dim3, size_t, hipStream_t) { return hipSuccess; }

hipError_t __hipPopCallConfiguration(dim3 * grid, dim3 * block, size_t * shared, hipStream_t * stream) {
    *grid = *block = dim3(1);
    *shared        = 0;
    return give(stream, hipStream_t(nullptr));
}

char __hip_fatbin[1];

void ** __hipRegisterFatBinary(const void *) {
    static void * it;
    return &it;
}

void __hipUnregisterFatBinary(void **) {}

void __hipRegisterFunction(
        void **, const void *, char *, const char *, unsigned, void *, void *, void *, void *, int *) {}

hipError_t hipStreamBeginCapture(hipStream_t, hipStreamCaptureMode) {
    capturing = true;
    counts.captures++;
    return hipSuccess;
}

hipError_t hipStreamEndCapture(hipStream_t, hipGraph_t * graph) {
    capturing = false;
    return some_handle(graph);
}

hipError_t hipGraphInstantiate(hipGraphExec_t * exec, hipGraph_t, hipGraphNode_t *, char *, size_t) {
    return some_handle(exec);
}

hipError_t hipGraphExecUpdate(hipGraphExec_t, hipGraph_t, hipGraphNode_t *, hipGraphExecUpdateResult * result) {
    return give(result, hipGraphExecUpdateSuccess);
}

hipError_t hipGraphLaunch(hipGraphExec_t, hipStream_t) {
    counts.replays++;
    return hipSuccess;
}

hipError_t hipGraphDestroy(hipGraph_t) { return hipSuccess; }

hipError_t hipGraphExecDestroy(hipGraphExec_t) { return hipSuccess; }

// hipBLAS

hipblasStatus_t hipblasCreate(hipblasHandle_t * handle) { return hipblasStatus_t(some_handle(handle)); }

hipblasStatus_t hipblasDestroy(hipblasHandle_t) { return HIPBLAS_STATUS_SUCCESS; }

hipblasStatus_t hipblasSetStream(hipblasHandle_t, hipStream_t) { return HIPBLAS_STATUS_SUCCESS; }

// products: arguments are left where they are, and so they need no names here
#define TEXT(name) #name
#define PRODUCT(i, name)                   \
    int product_##i() __asm__(TEXT(name)); \
    int product_##i() { return launch(); }

PRODUCT(1, hipblasGemmEx)
PRODUCT(2, hipblasGemmBatchedEx)
PRODUCT(3, hipblasGemmStridedBatchedEx)
PRODUCT(4, hipblasSgemm)
PRODUCT(5, hipblasSgemmBatched)
PRODUCT(6, hipblasSgemmStridedBatched)
PRODUCT(7, hipblasStrsmBatched)
}
