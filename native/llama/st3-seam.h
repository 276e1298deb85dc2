// st3-seam.h - llama_decode() with ST3: a batch on its way to the compute, past what waits in its sequences.
#pragma once

#include "llama-context.h"
#include "llama-model.h"
#include "st3-memory.h"

#include <cstdint>
#include <map>
#include <vector>

class st3_seam {
  public:
    st3_seam(llama_context & ctx, st3_memory & mem) : ctx(ctx), mem(mem), n_batch(ctx.cparams.n_batch) {}

    int decode(const llama_batch_ext & in);
    int decode_between(llama_seq_id seq_id);

  private:
    // A sequence's rows in a batch, none of which belongs to another as well.
    struct share_t {
        std::vector<size_t> rows;
        bool                output = false;
    };

    using shares_t = std::map<llama_seq_id, share_t>;

    int decode_image(const llama_batch_ext & in, llama_seq_id seq_id);
    int decode_text(const llama_batch_ext & in, const shares_t & shares);
    int decode_all(llama_seq_id seq_id);
    int ask(const llama_batch_ext & in, llama_seq_id seq_id, const share_t & share);
    int decode_waiting(llama_seq_id seq_id, uint32_t n_rows);

    void add_tokens(st3_prompt & prompt, const llama_batch_ext & in, const share_t & share) const;
    void hold(const llama_batch_ext & in, llama_seq_id seq_id, const share_t & share);
    bool fits(llama_seq_id seq_id, uint32_t n) const;

    bool valid(const llama_batch_ext & in) { return ctx.balloc->init(in, ctx.model.vocab, ctx.cparams.embeddings); }

    void renumber(const std::vector<size_t> & rows, size_t first);
    void take_outputs(const std::vector<size_t> & rows, size_t first, std::map<size_t, std::vector<float>> & to);
    void put_outputs(const std::map<size_t, std::vector<float>> & outputs);

    llama_context & ctx;
    st3_memory &    mem;
    const uint32_t  n_batch;
};
