// st3-graph.cpp - the call sites in llama.cpp's graph building, but for the cut.

#include "llama-impl.h"
#include "st3-graph-input.h"
#include "st3-ops.h"

#include <algorithm>
#include <array>
#include <map>

using namespace st3_ops;

llm_graph_input_attn_kv * st3_build_attn_inp(const llm_graph_context & g) {
    const auto * ctx = dynamic_cast<const st3_memory_context *>(g.mctx);
    if (!ctx) {
        return nullptr;
    }
    return static_cast<llm_graph_input_attn_kv *>(g.res->add_input(std::make_unique<st3_graph_input>(g, ctx)));
}

llm_graph_input_attn_kv_iswa * st3_build_attn_inp_iswa(const llm_graph_context & g) {
    auto * inp = static_cast<st3_graph_input *>(st3_build_attn_inp(g));
    if (!inp) {
        return nullptr;
    }
    return static_cast<llm_graph_input_attn_kv_iswa *>(g.res->add_input(std::make_unique<st3_graph_input_iswa>(inp)));
}

llm_graph_input_attn_kv * st3_inp_of(llm_graph_input_attn_kv_iswa * inp) {
    auto * iswa = dynamic_cast<st3_graph_input_iswa *>(inp);

    return iswa ? iswa->inp : nullptr;
}

llm_graph_input_attn_kv * st3_stage_inp(llm_graph_input_attn_kv * inp, int il) {
    auto * st3 = dynamic_cast<st3_graph_input *>(inp);

    return st3 ? st3->stage(il) : inp;
}

void st3_record_attention(
        const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il) {
    auto * inp = st3_find_input(g);
    if (!inp) {
        return;
    }
    ggml_context * ctx      = g.ctx0;
    const auto &   schedule = inp->ctx->schedule();
    const uint32_t stage    = schedule.stage(il);
    const bool     last     = schedule.last_layer(stage) == il;
    const bool     cuts     = stage < schedule.cuts.size();  // a cut follows

    k = ggml_permute(ctx, k, 0, 2, 1, 3);  // [d, n_kv, n_head_kv, n_stream]
    q = ggml_permute(ctx, q, 0, 2, 1, 3);  // [d, n_rows, n_head]

    for (auto & r : inp->recorders) {
        if (!r.ids[stage]) {
            continue;
        }
        const int64_t n_fresh = r.shape.n_fresh[stage];

        std::map<std::array<bool, 2>, ggml_tensor *> seen;  // terms may ask for the same

        const auto attention = [&](const st3_score_term & term) {
            ggml_tensor *& cur = seen[{ term.text, term.max }];
            if (cur) {
                return cur;
            }
            const int64_t n_rows = term.text ? r.shape.n_rows : 1;
            const int64_t row    = q->ne[1] - r.shape.from_end - n_rows;

            cur = attention_of(
                    ctx, inp->ctx->device(il),
                    ggml_view_3d(ctx, q, q->ne[0], n_rows, q->ne[2], q->nb[1], q->nb[2], row * q->nb[1]),
                    ggml_view_3d(ctx, k, k->ne[0], k->ne[1], k->ne[2], k->nb[1], k->nb[2], r.shape.stream * k->nb[3]),
                    ggml_view_2d(
                            ctx, kq_mask, kq_mask->ne[0], n_rows, kq_mask->nb[1],
                            (row - r.shape.stream * kq_mask->ne[1]) * kq_mask->nb[1] + r.shape.stream * kq_mask->nb[3]),
                    inp->slice(r.ids[stage], il), kq_scale, term.max);
            g.cb(cur, "st3_score", il);
            return cur;
        };
        for (size_t i = 0; i < schedule.terms.size() && cuts && n_fresh > 0; ++i) {
            if (last || schedule.terms[i].sum) {
                ggml_tensor * score = first_of(ctx, attention(schedule.terms[i]), n_fresh);
                if (inp->weights) {
                    score = ggml_div(ctx, score, inp->weights);
                }
                r.cut[i].add(ctx, score, schedule.terms[i].sum);
                ggml_build_forward_expand(g.gf, r.cut[i].t);
            }
        }
        for (size_t i = 0; i < schedule.anneal_terms.size() && r.shape.anneal; ++i) {
            if (last || schedule.anneal_terms[i].sum) {
                r.anneal[i].add(ctx, attention(schedule.anneal_terms[i]), schedule.anneal_terms[i].sum);
                ggml_build_forward_expand(g.gf, r.anneal[i].t);
            }
        }
    }
    if (!last) {
        return;
    }
    for (const auto & part : inp->layout) {
        if (part.stage == stage) {
            const auto &  r     = inp->recorders[part.record];
            ggml_tensor * score = st3_mean(ctx, part.cut ? r.cut : r.anneal);
            GGML_ASSERT(ggml_nelements(score) == part.n);
            inp->out = inp->out ? ggml_concat(ctx, inp->out, score, 0) : score;
        }
    }
    for (auto & r : inp->recorders) {
        r.anneal.assign(r.anneal.size(), {});  // the next stage has other tokens
    }
    if (il + 1 == (int) schedule.n_layer && inp->out) {
        ggml_set_name(inp->out, "st3_scores");
        ggml_set_output(inp->out);
        ggml_build_forward_expand(g.gf, inp->out);
    }
}

// Output rows, numbered as in the last stage.
class st3_input_out_ids : public llm_graph_input_i {
  public:
    st3_input_out_ids(ggml_tensor * out_ids, const st3_plan * plan) : out_ids(out_ids), plan(plan) {}

    void set_input(const llama_ubatch * ubatch) override {
        std::vector<int32_t> data;
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            if (ubatch->output[i]) {
                data.push_back((int32_t) plan->last_row(i));
            }
        }
        GGML_ASSERT((int64_t) data.size() == out_ids->ne[0]);
        ggml_backend_tensor_set(out_ids, data.data(), 0, ggml_nbytes(out_ids));
    }

  private:
    ggml_tensor *    out_ids;
    const st3_plan * plan;
};

ggml_tensor * st3_build_inp_out_ids(const llm_graph_context & g) {
    const auto * inp = st3_find_input(g);
    if (!inp || !inp->plan()) {
        return nullptr;
    }
    ggml_tensor * t = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, g.n_outputs);
    ggml_set_input(t);
    ggml_set_name(t, "out_ids");

    g.res->add_input(std::make_unique<st3_input_out_ids>(t, inp->plan()));
    return t;
}

constexpr int64_t ST3_FFN_ROWS = 512;  // as many as stock computes at once by default

ggml_tensor * st3_ffn_in_parts(
        const llm_graph_context & g, ggml_tensor * cur, const std::function<ggml_tensor *(ggml_tensor *)> & build) {
    if (cur->ne[1] <= ST3_FFN_ROWS || !st3_find_input(g)) {
        return nullptr;
    }
    const int64_t half = GGML_PAD(cur->ne[1] / 2, 64);

    ggml_tensor * head = build(view_rows(g.ctx0, cur, 0, half));
    ggml_tensor * tail = build(view_rows(g.ctx0, cur, half, cur->ne[1] - half));
    return ggml_concat(g.ctx0, head, tail, 1);
}

uint32_t st3_graph_extra_nodes(const llama_memory_i * memory, uint32_t n_tokens) {
    const auto * mem = dynamic_cast<const st3_memory *>(memory);
    if (!mem) {
        return 0;
    }
    const auto &   schedule = mem->schedule;
    const uint32_t n_terms  = (uint32_t) (1 + schedule.terms.size() + schedule.anneal_terms.size());
    const uint32_t n_rows   = std::max(n_tokens, mem->graph_rows());
    const uint32_t n_parts  = n_rows / (ST3_FFN_ROWS / 2);  // halves of what is a little more

    uint32_t n_records = 0;  // layers that record, over all terms
    for (const auto * terms : { &schedule.terms, &schedule.anneal_terms }) {
        for (const auto & term : *terms) {
            n_records += term.sum ? schedule.n_layer : mem->n_stage();
        }
    }

    // generous: about 10 nodes a layer, term and sequence to record, 20 an image, term and cut to select and gather, 40
    // an image and cut to merge, 10 a part
    return 16 * (n_records + mem->n_stage()) * mem->n_seq_max + (mem->n_window() > 0 ? 32 * mem->n_stage() : 0) +
           32 * (uint32_t) schedule.cuts.size() * mem->graph_images() *
                   (n_terms + (schedule.merge || schedule.distance ? 4 : 2)) +
           16 * schedule.n_layer * n_parts;
}

uint32_t st3_outputs_to_reserve(const llama_memory_i * memory, const llama_cparams & cparams, uint32_t n_outputs) {
    const auto * mem = dynamic_cast<const st3_memory *>(memory);
    return mem && !cparams.embeddings ? std::min(n_outputs, mem->n_seq_max) : n_outputs;  // pooling takes all rows
}
