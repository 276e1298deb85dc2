// counting_device.cpp - a GPU as ggml sees one: memory of its own, and the CPU backend to compute with; linked with an
// emulate_*.cpp, it computes ATTN_SPAN by that backend's kernels. It counts what would cost a real one: waits of the host,
// copies over the bus, and graphs (a graph is split where an op has to run elsewhere).
#include "device.h"
#include "emulate.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#pragma weak emulated_attn_span

namespace {

constexpr int N_SM = 16;  // of the emulated GPU

std::set<std::string> refused_ops;
device_counts         counts;
std::mutex            mutex;

void count(int64_t device_counts::*what, int64_t n) {
    const std::lock_guard<std::mutex> lock(mutex);
    counts.*what += n;
}

ggml_backend_dev_t cpu_device() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

// The op as a GPU's kernels compute it, or null.
const emulated_op * emulated(const ggml_tensor * op) {
    return op->op == GGML_OP_ATTN_SPAN && emulated_attn_span ? emulated_attn_span() : nullptr;
}

ggml_backend_dev_t         the_device();
ggml_backend_buffer_type_t the_buffer_type();

// memory, in which copies are as CUDA's: each waits until it is made

void buffer_free(ggml_backend_buffer_t buffer) { free(buffer->context); }

void * buffer_base(ggml_backend_buffer_t buffer) { return buffer->context; }

void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    count(&device_counts::waits, 1);
    memset((char *) t->data + offset, value, size);
}

void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    count(&device_counts::waits, 1);
    count(&device_counts::bytes_in, (int64_t) size);
    memcpy((char *) t->data + offset, data, size);
}

void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    count(&device_counts::waits, 1);
    count(&device_counts::bytes_out, (int64_t) size);
    memcpy(data, (const char *) t->data + offset, size);
}

bool buffer_copy(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    if (src->buffer->buft != the_buffer_type()) {
        return false;
    }
    count(&device_counts::waits, 1);
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); }

const char * name(ggml_backend_buffer_type_t) { return "Counting"; }

ggml_backend_buffer_t buffer_new(ggml_backend_buffer_type_t buft, size_t size) {
    const size_t padded = (size + 63) / 64 * 64;
    void *       data   = aligned_alloc(64, padded ? padded : 64);
    if (!data) {
        return nullptr;
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer           = buffer_free;
    iface.get_base              = buffer_base;
    iface.memset_tensor         = buffer_memset;
    iface.set_tensor            = buffer_set;
    iface.get_tensor            = buffer_get;
    iface.cpy_tensor            = buffer_copy;
    iface.clear                 = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, data, size);
}

size_t alignment(ggml_backend_buffer_type_t) { return 64; }

size_t alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    return ggml_nbytes(t) + (emulated(t) ? emulated(t)->extra(t) : 0);
}

ggml_backend_buffer_type_t the_buffer_type() {
    static ggml_backend_buffer_type res = [] {
        ggml_backend_buffer_type t = {};
        t.iface.get_name           = name;
        t.iface.alloc_buffer       = buffer_new;
        t.iface.get_alignment      = alignment;
        t.iface.get_alloc_size     = alloc_size;
        t.device                   = the_device();
        return t;
    }();
    return &res;
}

// the queue: work waits until the host does, so that what reads or overwrites too early does so always

struct queue {
    ggml_backend_t                     cpu;
    std::vector<std::function<void()>> waiting;

    void run() {
        for (const auto & work : std::exchange(waiting, {})) {
            work();
        }
    }
};

const char * name(ggml_backend_t) { return "Counting"; }

queue & queue_of(ggml_backend_t backend) { return *(queue *) backend->context; }

void backend_free(ggml_backend_t backend) {
    queue_of(backend).run();
    ggml_backend_free(queue_of(backend).cpu);
    delete &queue_of(backend);
    delete backend;
}

void set_async(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    void * to = (char *) t->data + offset;

    count(&device_counts::bytes_in, (int64_t) size);
    queue_of(backend).waiting.push_back([=] { memcpy(to, data, size); });
}

void get_async(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    const void * from = (const char *) t->data + offset;

    count(&device_counts::bytes_out, (int64_t) size);
    queue_of(backend).waiting.push_back([=] { memcpy(data, from, size); });
}

void backend_synchronize(ggml_backend_t backend) {
    count(&device_counts::waits, 1);
    queue_of(backend).run();
}

// A graph as it was when it was handed over: its tensors may be gone when it is computed.
class graph_copy {
  public:
    explicit graph_copy(const ggml_cgraph * graph) {
        for (int i = 0; i < graph->n_nodes; ++i) {
            nodes.push_back(copy(graph->nodes[i]));
        }
    }

    void compute(ggml_backend_t cpu) {
        static unsigned seed;

        for (size_t done = 0; done < nodes.size();) {
            if (const emulated_op * op = emulated(nodes[done])) {
                op->compute(nodes[done++], N_SM, ++seed);
                continue;
            }
            const size_t begin = done;
            while (done < nodes.size() && !emulated(nodes[done])) {
                ++done;
            }
            ggml_cgraph part = {};
            part.nodes       = nodes.data() + begin;
            part.n_nodes = part.size = (int) (done - begin);
            part.visited_hash_set    = { 1, &none, &no_key };  // nothing is fused
            GGML_ASSERT(ggml_backend_graph_compute(cpu, &part) == GGML_STATUS_SUCCESS);
        }
    }

  private:
    std::map<const ggml_tensor *, std::unique_ptr<ggml_tensor>> copies;
    std::vector<ggml_tensor *>                                  nodes;
    ggml_bitset_t                                               none   = 0;
    ggml_tensor *                                               no_key = nullptr;

    ggml_tensor * copy(const ggml_tensor * t) {
        auto & res = copies[t];
        if (t && !res) {
            res           = std::make_unique<ggml_tensor>(*t);
            res->view_src = copy(t->view_src);
            for (auto & src : res->src) {
                src = copy(src);
            }
        }
        return res.get();
    }
};

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    const auto copy = std::make_shared<graph_copy>(graph);
    queue &    q    = queue_of(backend);

    count(&device_counts::graphs, 1);
    q.waiting.push_back([=, cpu = q.cpu] { copy->compute(cpu); });
    return GGML_STATUS_SUCCESS;
}

ggml_backend_t backend_new(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 'c', 'o', 'u', 'n', 't', 'i', 'n', 'g' };

    auto * res                  = new ggml_backend{};
    res->guid                   = &guid;
    res->device                 = dev;
    res->context                = new queue{ ggml_backend_dev_init(cpu_device(), nullptr), {} };
    res->iface.get_name         = name;
    res->iface.free             = backend_free;
    res->iface.set_tensor_async = set_async;
    res->iface.get_tensor_async = get_async;
    res->iface.synchronize      = backend_synchronize;
    res->iface.graph_compute    = backend_compute;
    return res;
}

// the device

const char * name(ggml_backend_dev_t) { return "Counting0"; }

void memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = size_t(8) << 30; }

enum ggml_backend_dev_type type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void properties(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = name(dev);
    props->description = "a GPU that counts";
    props->type        = type(dev);
    props->caps.async  = true;
    memory(dev, &props->memory_free, &props->memory_total);
}

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t) { return the_buffer_type(); }

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const bool able = emulated(op) ? emulated(op)->supports(op) : ggml_backend_dev_supports_op(cpu_device(), op);
    return able && !refused_ops.count(ggml_op_name(op->op));
}

bool supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return buft == the_buffer_type(); }

const char * name(ggml_backend_reg_t) { return "Counting"; }

size_t device_count(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t device(ggml_backend_reg_t, size_t) { return the_device(); }

ggml_backend_reg_t the_reg() {
    static ggml_backend_reg res = {
        GGML_BACKEND_API_VERSION, {name, device_count, device, nullptr},
         nullptr
    };
    return &res;
}

ggml_backend_dev_t the_device() {
    static ggml_backend_device res = [] {
        ggml_backend_device d   = {};
        d.iface.get_name        = name;
        d.iface.get_description = name;
        d.iface.get_memory      = memory;
        d.iface.get_type        = type;
        d.iface.get_props       = properties;
        d.iface.init_backend    = backend_new;
        d.iface.get_buffer_type = buffer_type;
        d.iface.supports_op     = supports_op;
        d.iface.supports_buft   = supports_buft;
        d.reg                   = the_reg();
        return d;
    }();
    return &res;
}

}  // namespace

void device_register(const char * refused) {
    std::istringstream names(refused);
    for (std::string op; std::getline(names, op, ',');) {
        refused_ops.insert(op);
    }
    ggml_backend_register(the_reg());
}

device_counts device_take(void) {
    const std::lock_guard<std::mutex> lock(mutex);
    return std::exchange(counts, device_counts{});
}
