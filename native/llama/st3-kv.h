// st3-kv.h - the KV cache of one stage: llama.cpp's, but paid as used.
#pragma once

#include "llama-kv-cache.h"

#include <algorithm>

// Cells are allocated for what the stage holds, and grow in steps up to n_max per stream. Only one layer at a time exists
// twice while its tensors are replaced.
class st3_kv : public llama_kv_cache {
  public:
    st3_kv(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
           const layer_filter_cb & filter);

    // Makes room for n cells in every stream, or gives back what is far more than that. Nothing may be computing, unless
    // fits(n). Returns false, with everything as it was, if n is above n_max or there is no memory.
    bool fit(uint32_t n);

    // Whether the tensors are of a good size for n cells.
    bool fits(uint32_t n) const { return size_for(n) == get_size(); }

    // Number of times that the tensors were replaced: a graph made before holds views of freed memory.
    uint64_t generation() const { return n_resized; }

    const uint32_t n_max;

    uint32_t n_used(uint32_t stream) const { return v_cells[stream].get_used(); }

    // Used cells of the fullest stream.
    uint32_t n_used_max() const;

    // Takes a cell out of a sequence that has it; it is free once no sequence has it.
    void remove(llama_seq_id seq_id, uint32_t cell) { v_cells[get_stream(seq_id)].seq_rm(cell, seq_id); }

    // Lets the next tokens take the first free cells.
    void rewind() { std::fill(v_heads.begin(), v_heads.end(), 0); }

    // Copies between streams that seq_cp left for the next update are done now. Nothing may be computing.
    void flush_copies();

    llama_kv_cells &       cells(uint32_t stream) { return v_cells[stream]; }
    const llama_kv_cells & cells(uint32_t stream) const { return v_cells[stream]; }

    // What the first layer holds as values in these cells, F32 [cells][width]. Nothing may be computing.
    std::vector<float> values(uint32_t stream, const std::vector<uint32_t> & cells) const;

    size_t        n_layers() const { return layers.size(); }
    int32_t       layer_id(size_t i) const { return (int32_t) layers[i].il; }
    ggml_tensor * k_of(size_t i, uint32_t stream) const { return layers[i].k_stream[stream]; }
    ggml_tensor * v_of(size_t i, uint32_t stream) const { return layers[i].v_stream[stream]; }

  private:
    uint32_t size_for(uint32_t n) const;

    bool resize(uint32_t n);
    bool resize_layer(size_t i, uint32_t n);
    void compact();

    const uint32_t step;  // cells to grow by at least
    uint64_t       n_resized = 0;
};
