// st3-embed.h - the rows of a prompt as a batch, for which text has to be embeddings where an image is in it as well.
#pragma once

#include "llama-adapter.h"
#include "llama-batch.h"
#include "st3-prompt.h"

// Rows of a sequence. as_embeddings: its text as what llm_graph_context::build_inp_embd computes for tokens, on the host: rows of
// token_embd, dequantized as ggml_get_rows does, what adapters add to them, and the scale where the graph scales tokens but not
// embeddings; of a wider input (deepstack) the rest is 0.
llama_batch_ext st3_make_batch(
        llama_context & ctx, const llama_adapter_loras & loras, const st3_prompt & prompt, llama_seq_id seq_id,
        bool as_embeddings);
