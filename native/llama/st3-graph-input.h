// st3-graph-input.h - the inputs of a graph with a memory of stages, and what its building keeps between layers.
#pragma once

#include "llama-graph.h"
#include "st3-memory.h"

#include <array>
#include <memory>
#include <unordered_map>
#include <vector>

// Attention inputs, one set a stage, and what recording and cutting keep between layers.
//
// A graph on a GPU pays for each of its inputs with two waits: until the device has nothing to do, and until the copy is made.
// So the inputs of all stages go there together, one tensor a type, and the graph reads slices of the device's copy; of types
// that it cannot copy, each slice goes there by itself.
class st3_graph_input : public llm_graph_input_attn_kv {
  public:
    st3_graph_input(const llm_graph_context & g, const st3_memory_context * ctx);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    // The inputs of the stage that layer il belongs to.
    llm_graph_input_attn_kv * stage(int il) {
        const auto & s = stages[ctx->schedule().stage(il)];
        return windows && hparams.is_swa(il) ? s.window[place(il)].get() : s.graph[place(il)].get();
    }

    // Where layer il reads an input that the host writes.
    ggml_tensor * slice(const ggml_tensor * host, int il) const { return slices.at(host)[place(il)]; }

    const st3_plan * plan() const { return ctx->plan(); }

    // A sum over layers.
    struct sum_t {
        ggml_tensor * t        = nullptr;
        uint32_t      n_layers = 0;

        void add(ggml_context * ctx, ggml_tensor * x, bool sum) {
            t        = sum && t ? ggml_add(ctx, t, x) : x;
            n_layers = sum ? n_layers + 1 : 1;
        }
    };

    struct recorder_t {
        st3_record shape;

        std::vector<ggml_tensor *> ids;  // [stage] I32 [n_ids]: host's, cells of visual tokens; null where none is read
        std::vector<sum_t>         cut;  // [term of a cut's score]  F32 [n_fresh]
        std::vector<sum_t>         anneal;  // [term of annealing's]    F32 [n_ids]
    };

    const st3_memory_context *  ctx;
    std::vector<recorder_t>     recorders;
    std::vector<st3_score_part> layout;         // of out
    ggml_tensor *               out = nullptr;  // F32, output: the scores for the host

    // of a plan
    std::vector<ggml_tensor *>
            ids;  // [image] I32 [1, n]: original indices of the tokens it still has; null before the first cut
    std::vector<ggml_tensor *> bias;  // [cut] F32 [n_visual before any cut]: host's
    ggml_tensor * weights = nullptr;  // F32 [n_visual]: tokens that each visual one stands for; null: itself alone

    // The log weights of visual tokens are added to the masks of a stage, at their cells.
    void add_weights(ggml_context * ctx, uint32_t stage);

    // The masks of a stage's layers with a sliding window, from those of the others. pos I32: the positions of its rows first.
    void add_windows(ggml_context * ctx, uint32_t stage, ggml_tensor * pos);

  private:
    enum { HOST, DEVICE };

    // The host's and each place's, of one stage.
    struct stage_t {
        std::unique_ptr<llm_graph_input_attn_kv> host;
        std::unique_ptr<llm_graph_input_attn_kv> graph[2];
        std::unique_ptr<llm_graph_input_attn_kv> window[2];  // of layers with a sliding window

        // with windows, the host's: the mask of these layers; or of a cut prompt the positions of cells F32 [n_kv], and the cells of
        // its rows I32 [n_rows]
        ggml_tensor * window_mask = nullptr;
        ggml_tensor * cell_pos    = nullptr;
        ggml_tensor * row_cells   = nullptr;
    };

    int place(int il) const { return ctx->device(il) ? DEVICE : HOST; }

    void pack(ggml_context * ctx0, const std::vector<ggml_tensor *> & hosts);

    std::vector<stage_t> stages;

    // by the host's tensor, which is in no graph: the same in the input of its type, and in the device's copy of that
    std::unordered_map<const ggml_tensor *, std::array<ggml_tensor *, 2>> slices;

    ggml_backend_sched_t sched;
    uint64_t             generation;  // of the tensors that the graph has views of
    bool                 planned;
    bool                 windows;  // some row is too far from some cell for a sliding window
};

// The same for the graphs of models with sliding windows, which ask for inputs of that type.
class st3_graph_input_iswa : public llm_graph_input_attn_kv_iswa {
  public:
    explicit st3_graph_input_iswa(st3_graph_input * inp) :
        llm_graph_input_attn_kv_iswa(inp->hparams, inp->cparams, nullptr),
        inp(inp) {}

    void set_input(const llama_ubatch *) override {}
    bool can_reuse(const llm_graph_params &) override { return true; }

    st3_graph_input * const inp;
};

// The inputs of a graph with per-stage memory, or null.
st3_graph_input * st3_find_input(const llm_graph_context & g);

// Mean over terms of their means over layers.
ggml_tensor * st3_mean(ggml_context * ctx, const std::vector<st3_graph_input::sum_t> & terms);
