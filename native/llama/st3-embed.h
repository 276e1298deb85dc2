// st3-embed.h - text tokens as embeddings, for a batch that has an image's as well.
#pragma once

#include "llama-adapter.h"
#include "llama-model.h"

#include <vector>

// Computes on the host what llm_graph_context::build_inp_embd computes for tokens: rows of token_embd, dequantized as
// ggml_get_rows does, what adapters add to them, and the scale where the graph scales tokens but not embeddings.
class st3_embedder {
  public:
    st3_embedder(const llama_model & model, const llama_adapter_loras & loras);

    // out F32 [n_embd]. Of a wider input (deepstack) the rest is for the caller: 0.
    void embed(llama_token token, float * out) const;

  private:
    struct adapter_t {
        const ggml_tensor * a;  // [rank, n_vocab]
        std::vector<float>  b;  // [n_embd][rank]
        float               scale;
    };

    const llama_model &    model;
    std::vector<adapter_t> adapters;  // those of token_embd
};
