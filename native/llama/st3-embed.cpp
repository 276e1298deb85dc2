#include "st3-embed.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

namespace {

// Rows [first, first + n) of a matrix, as F32.
std::vector<float> rows_of(const ggml_tensor * t, int64_t first, int64_t n) {
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
float embedding_scale(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (model.arch == LLM_ARCH_GEMMA3) {
        return sqrtf((float) hparams.n_embd);
    }
    return hparams.f_embedding_scale != 0.0f && hparams.n_deepstack_layers > 0 ? hparams.f_embedding_scale : 1.0f;
}

class embedder {
  public:
    embedder(const llama_model & model, const llama_adapter_loras & loras) : model(model) {
        for (const auto & [lora, strength] : loras) {
            if (const auto * w = lora->get_weight(model.tok_embd)) {
                adapters.push_back({ w->a, rows_of(w->b, 0, w->b->ne[1]), w->get_scale(lora->alpha, strength) });
            }
        }
    }

    // out F32 [n_embd]
    void embed(llama_token token, float * out) const {
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

  private:
    struct adapter_t {
        const ggml_tensor * a;  // [rank, n_vocab]
        std::vector<float>  b;  // [n_embd][rank]
        float               scale;
    };

    const llama_model &    model;
    std::vector<adapter_t> adapters;  // those of token_embd
};

}  // namespace

llama_batch_ext st3_make_batch(
        llama_context & ctx, const llama_adapter_loras & loras, const st3_prompt & prompt, llama_seq_id seq_id,
        bool as_embeddings) {
    llama_batch_ext         res(&ctx);
    const float *           image = prompt.embd.data();
    std::optional<embedder> text;

    if (as_embeddings) {
        text.emplace(ctx.get_model(), loras);
        res.embd.reserve((size_t) prompt.n_rows() * res.n_embd_inp);
    }
    for (uint32_t i = 0; i < prompt.n_rows(); ++i) {
        llama_batch_ext::token row;
        row.id      = prompt.tokens[i];
        row.seq_ids = { seq_id };
        row.pos     = prompt.pos[i];
        if (as_embeddings || row.id == LLAMA_TOKEN_NULL) {
            row.has_embd = true;
            row.embd_off = res.embd.size();
            res.n_embd   = res.n_embd_inp;
            res.embd.resize(row.embd_off + res.n_embd);
            if (row.id == LLAMA_TOKEN_NULL) {
                std::copy_n(image, res.n_embd, res.embd.begin() + row.embd_off);
                image += res.n_embd;
            } else {
                text->embed(row.id, res.embd.data() + row.embd_off);
                row.id = LLAMA_TOKEN_NULL;
            }
        }
        res.tokens.push_back(std::move(row));
    }
    return res;
}
