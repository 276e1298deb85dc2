#include "st3-owners.h"

#include "ggml-cpp.h"
#include "st3-ops.h"

#include <algorithm>
#include <cmath>
#include <utility>

st3_owners::st3_owners(uint32_t n, std::vector<int32_t> ids_) : owners(n, -1), ids(std::move(ids_)) {
    for (const int32_t id : ids) {
        owners[id] = id;
    }
}

void st3_owners::cut(const std::vector<int32_t> & kept, const std::vector<int32_t> & places) {
    if (!places.empty()) {
        std::vector<int32_t> next(owners.size(), -1);
        for (size_t j = 0; j < ids.size(); ++j) {
            next[ids[j]] = kept.at((size_t) places[j]);
        }
        for (auto & o : owners) {
            o = o < 0 ? o : next[o];
        }
    } else if (kept.empty()) {
        owners.assign(owners.size(), -1);
    }
    ids = kept;
}

std::vector<float> st3_owners::weights() const {
    std::vector<float> res(owners.size());
    for (const int32_t o : owners) {
        if (o >= 0) {
            res[o] += 1.0f;
        }
    }
    return res;
}

bool st3_likeness::knows(const std::vector<uint32_t> & tokens) const {
    return std::includes(ids.begin(), ids.end(), tokens.begin(), tokens.end());
}

uint32_t st3_likeness::nearest(uint32_t id, const std::vector<uint32_t> & kept) const {
    const size_t  row  = std::lower_bound(ids.begin(), ids.end(), id) - ids.begin();
    const float * own  = cosines.data() + row * ids.size();
    uint32_t      best = kept[0];
    float         most = -INFINITY;
    for (size_t i = 0, k = 0; k < kept.size(); ++i) {
        if (ids[i] != kept[k]) {
            continue;
        }
        if (own[i] > most) {
            most = own[i];
            best = kept[k];
        }
        k++;
    }
    return best;
}

st3_likeness st3_compare(std::vector<uint32_t> ids, const std::vector<float> & rows, int n_threads) {
    const auto n = (int64_t) ids.size();

    ggml_context_ptr ctx{ ggml_init({ 16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_backend_ptr cpu{ ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };

    ggml_tensor * in        = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, (int64_t) rows.size() / n, n);
    ggml_tensor * direction = st3_ops::directions(ctx.get(), in);
    ggml_tensor * out       = st3_ops::cosines(ctx.get(), direction, direction);
    ggml_cgraph * graph     = ggml_new_graph(ctx.get());
    ggml_set_input(in);
    ggml_set_output(out);
    ggml_build_forward_expand(graph, out);

    ggml_gallocr_ptr memory{ ggml_gallocr_new(ggml_backend_get_default_buffer_type(cpu.get())) };
    GGML_ASSERT(ggml_gallocr_alloc_graph(memory.get(), graph));
    ggml_backend_tensor_set(in, rows.data(), 0, ggml_nbytes(in));
    const auto reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
    if (auto * set = ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        ((ggml_backend_set_n_threads_t) set)(cpu.get(), n_threads);
    }
    ggml_backend_graph_compute(cpu.get(), graph);

    st3_likeness res = { std::move(ids), std::vector<float>(n * n) };
    ggml_backend_tensor_get(out, res.cosines.data(), 0, ggml_nbytes(out));
    return res;
}
