#include "st3-likeness.h"

#include "ggml-cpp.h"
#include "st3-ops.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <numeric>
#include <utility>

// A table of all pairs would be the square of a picture's tokens. As few of them leave at a time, one of the most alike is there
// as a rule.
static constexpr size_t MOST_NEAR = 128;

std::vector<float>
st3_cosines(const std::vector<float> & a, size_t n_a, const std::vector<float> & b, size_t n_b, int n_threads) {
    ggml_context_ptr ctx{ ggml_init({ 16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_backend_ptr cpu{ ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };

    const auto    width = (int64_t) (a.size() / n_a);
    ggml_tensor * in_a  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, width, (int64_t) n_a);
    ggml_tensor * in_b  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, width, (int64_t) n_b);
    ggml_tensor * out =
            st3_ops::cosines(ctx.get(), st3_ops::directions(ctx.get(), in_b), st3_ops::directions(ctx.get(), in_a));
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_set_input(in_a);
    ggml_set_input(in_b);
    ggml_set_output(out);
    ggml_build_forward_expand(graph, out);

    const auto reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
    if (auto * set = ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        ((ggml_backend_set_n_threads_t) set)(cpu.get(), n_threads);
    }
    ggml_gallocr_ptr memory{ ggml_gallocr_new(ggml_backend_get_default_buffer_type(cpu.get())) };
    if (!ggml_gallocr_alloc_graph(memory.get(), graph)) {
        throw std::bad_alloc();
    }
    ggml_backend_tensor_set(in_a, a.data(), 0, ggml_nbytes(in_a));
    ggml_backend_tensor_set(in_b, b.data(), 0, ggml_nbytes(in_b));
    if (ggml_backend_graph_compute(cpu.get(), graph) != GGML_STATUS_SUCCESS) {
        throw std::bad_alloc();  // on a CPU that nobody stops there is no other reason
    }
    std::vector<float> res(n_a * n_b);
    ggml_backend_tensor_get(out, res.data(), 0, ggml_nbytes(out));
    return res;
}

st3_likeness::st3_likeness(std::vector<uint32_t> ids_, const std::vector<float> & cosines) :
    ids(std::move(ids_)),
    n_near(std::min(MOST_NEAR, ids.size() - 1)) {
    near.reserve(ids.size() * n_near);
    std::vector<size_t> order(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
        const float * own = cosines.data() + i * ids.size();
        std::iota(order.begin(), order.end(), 0);
        std::swap(order[i], order.back());  // not itself
        std::partial_sort(order.begin(), order.begin() + n_near, order.end() - 1, [=](size_t p, size_t q) {
            return own[p] > own[q] || (own[p] == own[q] && p < q);
        });
        std::transform(
                order.begin(), order.begin() + n_near, std::back_inserter(near), [&](size_t p) { return ids[p]; });
    }
}

uint32_t st3_likeness::nearest(uint32_t id, const std::vector<uint32_t> & kept) const {
    const auto it = std::lower_bound(ids.begin(), ids.end(), id);
    if (it == ids.end() || *it != id) {
        return NONE;
    }
    const auto is_kept = [&](uint32_t other) { return std::binary_search(kept.begin(), kept.end(), other); };
    const auto first   = near.begin() + (it - ids.begin()) * n_near;
    const auto found   = std::find_if(first, first + n_near, is_kept);
    return found == first + n_near ? NONE : *found;
}
