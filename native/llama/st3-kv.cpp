#include "st3-kv.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#ifdef __GLIBC__
#include <malloc.h>
#endif

// Steps of growth. Elsewhere than on the host, flash attention's fast kernels take multiples of 256 cells only.
static constexpr uint32_t STEP_HOST   = 32;
static constexpr uint32_t STEP_DEVICE = 256;

static uint32_t
step_of(const llama_model & model, const llama_cparams & cparams, const llama_kv_cache::layer_filter_cb & filter) {
    for (int32_t il = 0; il < (int32_t) model.hparams.n_layer(); ++il) {
        if (cparams.offload_kqv && filter(il) &&
            !ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(model.dev_layer(il)))) {
            return STEP_DEVICE;
        }
    }
    return STEP_HOST;
}

st3_kv::st3_kv(
        const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
        const layer_filter_cb & filter) :
    // V is not transposed, whether flash attention runs or not: so a cell is one row, which can be moved
    llama_kv_cache(
            model, model.hparams, params.type_k, params.type_v, false, cparams.offload_kqv, cparams.kv_unified,
            // a dry run that asks what memory is needed gets the most there can be
            model.hparams.no_alloc ? cparams.n_ctx_seq : std::min(cparams.n_ctx_seq, step_of(model, cparams, filter)),
            cparams.n_seq_max, 1, 0, LLAMA_SWA_TYPE_NONE, nullptr, filter, nullptr, nullptr),
    n_max(cparams.n_ctx_seq),
    step(step_of(model, cparams, filter)) {
    if (hparams.no_alloc) {
        return;
    }
    // every layer gets a buffer of its own, which it can change for another
    const auto of_all = std::move(ctxs_bufs);
    ctxs_bufs         = decltype(ctxs_bufs)(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        if (!resize_layer(i, get_size())) {
            throw std::runtime_error("failed to allocate buffer for kv cache");
        }
    }
}

uint32_t st3_kv::n_used_max() const {
    uint32_t res = 0;
    for (const auto & c : v_cells) {
        res = std::max(res, c.get_used());
    }
    return res;
}

// Rows [src_row, src_row + n) of src to those from dst_row on of dst: matrices of one type and row length, on one device.
static void copy_rows(ggml_tensor * src, uint32_t src_row, ggml_tensor * dst, uint32_t dst_row, uint32_t n) {
    ggml_context_ptr ctx{ ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }) };

    const auto view = [&](ggml_tensor * t, uint32_t row) {
        ggml_tensor * v = ggml_view_2d(ctx.get(), t, t->ne[0], n, t->nb[1], row * t->nb[1]);
        ggml_backend_view_init(v);
        return v;
    };
    if (n > 0) {
        ggml_backend_tensor_copy(view(src, src_row), view(dst, dst_row));
    }
}

void st3_kv::flush_copies() {
    for (size_t c = 0; c < sc_info.ssrc.size(); ++c) {
        for (const auto & layer : layers) {
            ggml_backend_tensor_copy(layer.k_stream[sc_info.ssrc[c]], layer.k_stream[sc_info.sdst[c]]);
            ggml_backend_tensor_copy(layer.v_stream[sc_info.ssrc[c]], layer.v_stream[sc_info.sdst[c]]);
        }
    }
    sc_info = {};
}

std::vector<float> st3_kv::values(uint32_t stream, const std::vector<uint32_t> & cells) const {
    const ggml_tensor * t     = v_of(0, stream);
    const int64_t       width = t->ne[0];
    const auto          cast  = ggml_get_type_traits(t->type)->to_float;

    std::vector<uint8_t> rows;
    std::vector<float>   res(cells.size() * width);
    for (size_t i = 0, n = 0; i < cells.size(); i += n) {
        n = 1;
        while (i + n < cells.size() && cells[i + n] == cells[i] + n) {
            n++;
        }
        rows.resize(n * t->nb[1]);
        ggml_backend_tensor_get(t, rows.data(), cells[i] * t->nb[1], rows.size());
        if (t->type == GGML_TYPE_F32) {
            memcpy(res.data() + i * width, rows.data(), rows.size());
        } else {
            cast(rows.data(), res.data() + i * width, (int64_t) n * width);
        }
    }
    return res;
}

uint32_t st3_kv::size_for(uint32_t n) const {
    const auto padded = [&](uint32_t x) { return std::min(n_max, GGML_PAD(std::max(x, 1u), step)); };

    const uint32_t size = get_size();
    if (n > size) {
        // a prompt says what it needs; an answer grows token by token, so each of its copies has to last for some
        return padded(n > size + step ? n : std::max(n, size + size / 16));
    }
    return size > 2 * padded(n) && !hparams.no_alloc ? padded(n) : size;
}

bool st3_kv::fit(uint32_t n) {
    if (n > n_max) {
        return false;
    }
    const uint32_t size = size_for(n);
    if (size < get_size()) {
        compact();
        resize(size);  // where it cannot be, they stay as large
        return true;
    }
    return size == get_size() || resize(size);
}

// Moves the used cells beyond the number of them into free cells below.
void st3_kv::compact() {
    GGML_ASSERT(!get_has_shift());

    for (uint32_t s = 0; s < n_stream; ++s) {
        auto &         cells  = v_cells[s];
        const uint32_t n_used = cells.get_used();

        std::vector<uint32_t> src, dst;
        for (uint32_t i = n_used; i < cells.used_max_p1(); ++i) {
            if (!cells.is_empty(i)) {
                src.push_back(i);
            }
        }
        for (uint32_t i = 0; i < n_used; ++i) {
            if (cells.is_empty(i)) {
                dst.push_back(i);
            }
        }
        GGML_ASSERT(src.size() == dst.size());

        for (size_t i = 0; i < src.size();) {
            uint32_t n = 1;
            while (i + n < src.size() && src[i + n] == src[i] + n && dst[i + n] == dst[i] + n) {
                n++;
            }
            for (const auto & layer : layers) {
                copy_rows(layer.k_stream[s], src[i], layer.k_stream[s], dst[i], n);
                copy_rows(layer.v_stream[s], src[i], layer.v_stream[s], dst[i], n);
            }
            i += n;
        }
        cells.set(dst, cells.cp(src));
        for (const uint32_t i : src) {
            cells.rm(i);
        }
    }
}

// New tensors of n cells for layer i, with what the old ones hold; false if there is no memory for them.
bool st3_kv::resize_layer(size_t i, uint32_t n) {
    auto & layer = layers[i];

    ggml_context_ptr ctx{ ggml_init({ 2 * (1 + n_stream) * ggml_tensor_overhead(), nullptr, true }) };

    const auto create = [&](const ggml_tensor * old, std::vector<ggml_tensor *> & streams) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx.get(), old->type, old->ne[0], n, n_stream);
        ggml_set_name(t, old->name);
        for (uint32_t s = 0; s < n_stream; ++s) {
            streams.push_back(ggml_view_2d(ctx.get(), t, t->ne[0], n, t->nb[1], s * t->nb[2]));
        }
        return t;
    };
    kv_layer res = { layer.il, nullptr, nullptr, {}, {} };
    res.k        = create(layer.k, res.k_stream);
    res.v        = create(layer.v, res.v_stream);

    ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors_from_buft(
            ctx.get(), ggml_backend_buffer_get_type(layer.k->buffer)) };
    if (!buf) {
        return false;
    }
    ggml_backend_buffer_clear(buf.get(), 0);  // masked cells are multiplied by zero, which NaN would survive

    for (uint32_t s = 0; s < n_stream; ++s) {
        const uint32_t n_rows = std::min(n, v_cells[s].used_max_p1());
        copy_rows(layer.k_stream[s], 0, res.k_stream[s], 0, n_rows);
        copy_rows(layer.v_stream[s], 0, res.v_stream[s], 0, n_rows);
    }
    layer = std::move(res);
    n_resized++;  // graphs that saw the old tensors must not be used again

    ctxs_bufs[i] = { std::move(ctx), std::move(buf) };
    return true;
}

bool st3_kv::resize(uint32_t n) {
    GGML_ASSERT(!get_has_shift());

    const uint32_t old = get_size();

    std::vector<llama_kv_cells> tables;  // first, as what is thrown here leaves all as it was
    for (const auto & cells : v_cells) {
        tables.emplace_back().resize(n);
        tables.back().set(0, cells.cp(0, std::min(n, old)));
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        if (!resize_layer(i, n)) {
            LLAMA_LOG_ERROR("%s: no memory for %u KV cells in layer %d\n", __func__, n, layer_id(i));
            for (size_t j = 0; j < i; ++j) {
                GGML_ASSERT(resize_layer(j, old) && "memory that was just freed");
            }
            return false;
        }
    }
#ifdef __GLIBC__
    malloc_trim(0);  // tensors of many sizes come and go: else what they left would stay resident
#endif

    std::move(tables.begin(), tables.end(), v_cells.begin());
    rewind();
    return true;
}
