#include "st3-embed.h"

#include <cmath>
#include <cstring>
#include <numeric>

// Rows [first, first + n) of a matrix, as F32.
static std::vector<float> rows_of(const ggml_tensor * t, int64_t first, int64_t n) {
    std::vector<uint8_t> raw(n * t->nb[1]);
    std::vector<float>   res(n * t->ne[0]);

    ggml_backend_tensor_get(t, raw.data(), first * t->nb[1], raw.size());
    if (t->type == GGML_TYPE_F32) {
        memcpy(res.data(), raw.data(), raw.size());
    } else {
        ggml_get_type_traits(t->type)->to_float(raw.data(), res.data(), (int64_t) res.size());
    }
    return res;
}

// What the graph multiplies tokens by, and embeddings not.
static float embedding_scale(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (model.arch == LLM_ARCH_GEMMA3) {
        return sqrtf((float) hparams.n_embd);
    }
    return hparams.f_embedding_scale != 0.0f && hparams.n_deepstack_layers > 0 ? hparams.f_embedding_scale : 1.0f;
}

st3_embedder::st3_embedder(const llama_model & model, const llama_adapter_loras & loras) : model(model) {
    for (const auto & [lora, strength] : loras) {
        if (const auto * w = lora->get_weight(model.tok_embd)) {
            adapters.push_back({ w->a, rows_of(w->b, 0, w->b->ne[1]), w->get_scale(lora->alpha, strength) });
        }
    }
}

void st3_embedder::embed(llama_token token, float * out) const {
    const auto row = rows_of(model.tok_embd, token, 1);
    std::copy(row.begin(), row.end(), out);

    for (const auto & adapter : adapters) {
        const auto a = rows_of(adapter.a, token, 1);
        for (size_t i = 0; i < row.size(); ++i) {
            out[i] += adapter.scale * std::inner_product(a.begin(), a.end(), &adapter.b[i * a.size()], 0.0f);
        }
    }
    const float scale = embedding_scale(model);
    if (scale != 1.0f) {
        for (size_t i = 0; i < row.size(); ++i) {
            out[i] *= scale;
        }
    }
}
