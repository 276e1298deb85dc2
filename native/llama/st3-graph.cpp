#include "st3-graph.h"

#include "llama-impl.h"
#include "st3-memory.h"
#include "st3-ops.h"

#include <algorithm>
#include <array>
#include <map>
#include <unordered_map>

using namespace st3_ops;

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
    llm_graph_input_attn_kv * stage(int il) { return stages[ctx->schedule().stage(il)].graph[place(il)].get(); }

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

    const st3_memory_context * ctx;
    std::vector<recorder_t>    recorders;
    ggml_tensor *              out = nullptr;  // F32, output: the scores for the host, one after the other

    // of a plan
    std::vector<ggml_tensor *>
            ids;  // [image] I32 [1, n]: original indices of the tokens it still has; null before the first cut
    std::vector<ggml_tensor *> bias;  // [cut] F32 [n_visual before any cut]: host's
    ggml_tensor * weights = nullptr;  // F32 [n_visual]: tokens that each visual one stands for; null: itself alone

    // The log weights of visual tokens are added to the masks of a stage, at their cells.
    void add_weights(ggml_context * ctx, uint32_t stage);

  private:
    enum { HOST, DEVICE };

    // The host's and each place's, of one stage.
    struct stage_t {
        std::unique_ptr<llm_graph_input_attn_kv> host;
        std::unique_ptr<llm_graph_input_attn_kv> graph[2];
    };

    int place(int il) const { return ctx->device(il) ? DEVICE : HOST; }

    void pack(ggml_context * ctx0, const std::vector<ggml_tensor *> & hosts);

    std::vector<stage_t> stages;

    // by the host's tensor, which is in no graph: the same in the input of its type, and in the device's copy of that
    std::unordered_map<const ggml_tensor *, std::array<ggml_tensor *, 2>> slices;

    ggml_backend_sched_t sched;
    uint64_t             generation;  // of the tensors that the graph has views of
    bool                 planned;
};

st3_graph_input::st3_graph_input(const llm_graph_context & g, const st3_memory_context * ctx) :
    llm_graph_input_attn_kv(g.hparams, g.cparams, ctx->stage(0)),
    ctx(ctx),
    sched(g.sched),
    generation(ctx->generation()),
    planned(ctx->plan()) {
    const auto & schedule = ctx->schedule();

    std::vector<ggml_tensor *> hosts;

    const auto add = [&](ggml_tensor * t) {
        if (t) {
            hosts.push_back(t);
        }
        return t;
    };

    for (uint32_t s = 0; s < ctx->n_stage(); ++s) {
        const auto * mctx_s = ctx->stage(s);
        const auto & ubatch = planned ? plan()->ubatches[s] : g.ubatch;
        const auto   n_strm = cparams.kv_unified ? 1 : ubatch.n_seqs_unq;

        // as upstream's build_attn_inp_kv_impl
        auto inp          = std::make_unique<llm_graph_input_attn_kv>(hparams, cparams, mctx_s);
        inp->self_k_idxs  = add(mctx_s->build_input_k_idxs(g.ctx0, ubatch));
        inp->self_v_idxs  = add(mctx_s->build_input_v_idxs(g.ctx0, ubatch));
        inp->self_kq_mask = add(ggml_new_tensor_4d(
                g.ctx0, cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, mctx_s->get_n_kv(),
                ubatch.n_tokens / n_strm, 1, n_strm));
        if (s == 0) {  // the same for all
            inp->self_k_rot = add(mctx_s->build_input_k_rot(g.ctx0));
            inp->self_v_rot = add(mctx_s->build_input_v_rot(g.ctx0));
        }
        stages.push_back({ std::move(inp), {} });
    }

    for (const auto & record : ctx->records()) {
        recorder_t r;
        r.shape = record;
        r.cut.resize(schedule.terms.size());
        r.anneal.resize(schedule.anneal_terms.size());
        for (uint32_t s = 0; s < ctx->n_stage(); ++s) {
            const bool cut  = record.n_fresh[s] > 0 && s < schedule.cuts.size() && !schedule.terms.empty();
            const bool read = record.n_ids[s] > 0 && (record.anneal || cut || (planned && schedule.merge && s > 0));
            r.ids.push_back(read ? add(ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, record.n_ids[s])) : nullptr);
        }
        recorders.push_back(std::move(r));
    }
    if (planned) {
        ids.assign(plan()->spans.size(), nullptr);
        for (uint32_t s = 0; s + 1 < ctx->n_stage(); ++s) {
            bias.push_back(add(ggml_new_tensor_1d(g.ctx0, GGML_TYPE_F32, plan()->n_visual(0))));
        }
    }
    pack(g.ctx0, hosts);
}

// The type of the input that holds t: I64 goes as I32, since hardly a backend copies it.
static ggml_type packed_type(const ggml_tensor * t) { return t->type == GGML_TYPE_I64 ? GGML_TYPE_I32 : t->type; }

// The bytes of input, a vector, from offset on, as a tensor like t.
static ggml_tensor * view_as(ggml_context * ctx0, ggml_tensor * input, const ggml_tensor * t, size_t offset) {
    ggml_tensor * res = ggml_view_1d(ctx0, input, (int64_t) (ggml_nbytes(t) / ggml_type_size(input->type)), offset);

    res->type = t->type;
    std::copy_n(t->ne, GGML_MAX_DIMS, res->ne);
    std::copy_n(t->nb, GGML_MAX_DIMS, res->nb);
    return res;
}

void st3_graph_input::pack(ggml_context * ctx0, const std::vector<ggml_tensor *> & hosts) {
    constexpr size_t ALIGNMENT = 256;      // of slices: more than any kernel asks of its sources
    constexpr size_t MAX_COPY  = 1 << 20;  // a prompt's masks take long to compute with anyway, and much memory

    std::map<ggml_type, size_t> sizes;
    std::vector<size_t>         offsets;
    for (const auto * t : hosts) {
        size_t & size = sizes[packed_type(t)];
        offsets.push_back(size);
        size += GGML_PAD(ggml_nbytes(t), ALIGNMENT);
    }

    ggml_backend_dev_t dev = nullptr;
    for (int il = 0; il < (int) ctx->schedule().n_layer && !dev; ++il) {
        dev = ctx->device(il);
    }

    std::map<ggml_type, std::array<ggml_tensor *, 2>> inputs;
    for (const auto & [type, size] : sizes) {
        ggml_tensor * input = ggml_new_tensor_1d(ctx0, type, (int64_t) (size / ggml_type_size(type)));
        ggml_set_input(input);
        ggml_format_name(input, "st3_inputs_%s", ggml_type_name(type));

        ggml_tensor * copy = ggml_cont(ctx0, input);
        const bool    use  = dev && size <= MAX_COPY && ggml_backend_dev_supports_op(dev, copy);
        inputs[type]       = { input, use ? copy : input };
    }

    for (size_t i = 0; i < hosts.size(); ++i) {
        const ggml_tensor * t = hosts[i];
        for (const int place : { HOST, DEVICE }) {
            slices[t][place] = view_as(ctx0, inputs[packed_type(t)][place], t, offsets[i]);
        }
    }

    const auto & first = *stages[0].host;
    for (auto & stage : stages) {
        for (const int place : { HOST, DEVICE }) {
            const auto at = [&](const ggml_tensor * t) { return t ? slices.at(t)[place] : nullptr; };

            auto inp              = std::make_unique<llm_graph_input_attn_kv>(hparams, cparams, stage.host->mctx);
            inp->self_k_idxs      = at(stage.host->self_k_idxs);
            inp->self_v_idxs      = at(stage.host->self_v_idxs);
            inp->self_kq_mask     = at(stage.host->self_kq_mask);
            inp->self_kq_mask_cnv = inp->self_kq_mask;
            inp->self_k_rot       = at(first.self_k_rot);
            inp->self_v_rot       = at(first.self_v_rot);
            stage.graph[place]    = std::move(inp);
        }
    }
}

void st3_graph_input::set_input(const llama_ubatch * ubatch) {
    // an input that no node came to use (a cut that drops all or nothing) has no buffer
    for (const auto & [host, slice] : slices) {
        const ggml_tensor * input = slice[HOST]->view_src;

        auto * t  = const_cast<ggml_tensor *>(host);
        t->buffer = input->buffer;
        t->data   = input->buffer ? (char *) input->data + slice[HOST]->view_offs : nullptr;
    }
    const auto set = [](ggml_tensor * t, const void * data) {
        if (t && t->buffer) {
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
    };

    for (uint32_t s = 0; s < stages.size(); ++s) {
        const auto & rows = planned ? plan()->ubatches[s] : *ubatch;
        stages[s].host->set_input(&rows);
        if (stages[s].host->self_kq_mask->data) {
            ctx->add_weights(s, rows, stages[s].host->self_kq_mask);
        }
    }
    ctx->attach(out, sched);

    for (size_t i = 0; i < recorders.size(); ++i) {
        for (uint32_t s = 0; s < stages.size(); ++s) {
            auto cells = ctx->records()[i].cells[s];
            cells.resize(recorders[i].shape.n_ids[s]);  // the padding's scores are not looked at
            set(recorders[i].ids[s], cells.data());
        }
    }
    for (uint32_t s = 0; s < bias.size(); ++s) {
        std::vector<float> data;
        for (size_t i = 0; i < plan()->spans.size(); ++i) {
            const auto & span = plan()->spans[i];
            const auto   b    = ctx->schedule().bias(
                         span.nx, span.ny, plan()->counts[s + 1][i], plan()->number + (uint32_t) i, ctx->schedule().random);
            data.insert(data.end(), b.begin(), b.end());
        }
        set(bias[s], data.data());
    }
}

bool st3_graph_input::can_reuse(const llm_graph_params & params) {
    const auto * next = dynamic_cast<const st3_memory_context *>(params.mctx);

    // the graph of a pruned prompt is for that prompt alone
    if (!next || next->plan() || planned || stages.size() != next->n_stage() || generation != next->generation() ||
        recorders.size() != next->records().size()) {
        return false;
    }
    for (size_t i = 0; i < recorders.size(); ++i) {
        if (!recorders[i].shape.same_graph(next->records()[i])) {
            return false;
        }
    }

    bool             res = true;
    llm_graph_params p   = params;
    for (uint32_t s = 0; s < stages.size(); ++s) {
        p.mctx = next->stage(s);
        res    = stages[s].host->can_reuse(p) && res;
    }
    ctx  = next;
    mctx = next->stage(0);
    return res;
}

llm_graph_input_attn_kv * st3_build_attn_inp(const llm_graph_context & g) {
    const auto * ctx = dynamic_cast<const st3_memory_context *>(g.mctx);
    if (!ctx) {
        return nullptr;
    }
    return static_cast<llm_graph_input_attn_kv *>(g.res->add_input(std::make_unique<st3_graph_input>(g, ctx)));
}

llm_graph_input_attn_kv * st3_stage_inp(llm_graph_input_attn_kv * inp, int il) {
    auto * st3 = dynamic_cast<st3_graph_input *>(inp);

    return st3 ? st3->stage(il) : inp;
}

// The inputs of a graph with per-stage memory, or null.
static st3_graph_input * find_input(const llm_graph_context & g) {
    for (auto & inp : g.res->inputs) {
        if (auto * st3 = dynamic_cast<st3_graph_input *>(inp.get())) {
            return st3;
        }
    }
    return nullptr;
}

// Mean over terms of their means over layers.
static ggml_tensor * mean(ggml_context * ctx, const std::vector<st3_graph_input::sum_t> & terms) {
    ggml_tensor * res = nullptr;
    for (const auto & term : terms) {
        ggml_tensor * t = ggml_scale(ctx, term.t, 1.0f / float(term.n_layers * terms.size()));
        res             = res ? ggml_add(ctx, res, t) : t;
    }
    return res;
}

void st3_record_attention(
        const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il) {
    auto * inp = find_input(g);
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
        const auto emit = [&](ggml_tensor * t) { inp->out = inp->out ? ggml_concat(ctx, inp->out, t, 0) : t; };

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
        // in the order in which st3_memory::absorb() reads them
        if (last && r.shape.anneal) {
            emit(mean(ctx, r.anneal));
            r.anneal.assign(r.anneal.size(), {});  // the next stage has other tokens
        }
        if (last && cuts && r.shape.cut) {
            emit(mean(ctx, r.cut));
        }
    }
    if (il + 1 == (int) schedule.n_layer && inp->out) {
        ggml_set_name(inp->out, "st3_scores");
        ggml_set_output(inp->out);
        ggml_build_forward_expand(g.gf, inp->out);
    }
}

void st3_graph_input::add_weights(ggml_context * ctx0, uint32_t stage) {
    for (const int place : { HOST, DEVICE }) {
        auto & inp  = *stages[stage].graph[place];
        auto * mask = inp.self_kq_mask;

        ggml_tensor * cells = slices.at(recorders[0].ids[stage])[place];
        cells               = ggml_view_1d(ctx0, cells, weights->ne[0], 0);

        ggml_tensor * bias = ggml_reshape_2d(ctx0, filled(ctx0, mask->ne[0], 0.0f), 1, mask->ne[0]);
        bias               = ggml_set_rows(ctx0, bias, as_column(ctx0, ggml_log(ctx0, weights)), cells);
        bias               = ggml_cast(ctx0, as_vector(ctx0, bias), mask->type);

        inp.self_kq_mask     = ggml_add(ctx0, mask, bias);
        inp.self_kq_mask_cnv = inp.self_kq_mask;
    }
}

ggml_tensor * st3_cut(llm_graph_context & g, ggml_tensor * cur, ggml_tensor *& inp_pos, int il) {
    auto * inp  = find_input(g);
    auto * plan = inp ? inp->ctx->plan() : nullptr;
    if (!plan) {
        return cur;
    }
    const auto &   schedule = inp->ctx->schedule();
    const uint32_t stage    = schedule.stage(il);
    if (stage == schedule.cuts.size() || schedule.cuts[stage] != il) {
        return cur;
    }

    ggml_context *     ctx     = g.ctx0;
    ggml_backend_dev_t dev     = inp->ctx->device(il);
    const auto         n_image = plan->spans.size();

    if (il == schedule.cuts[0]) {
        plan->kept.clear();
        plan->owners.clear();
    }

    // rank of every visual token, but for its bias
    auto &        sums  = inp->recorders[0].cut;
    ggml_tensor * bias  = inp->slice(inp->bias[stage], il);
    ggml_tensor * score = plan->n_visual(stage) > 0 ? mean(ctx, sums) : nullptr;

    // What becomes of each image's rows; null where none or all of them stay.
    struct part_t {
        ggml_tensor * stay    = nullptr;  // I32 [n_keep] those that do, counted from the image's first
        ggml_tensor * owner   = nullptr;  // I32 [n]
        ggml_tensor * rows    = nullptr;  // F32 [n_embd, n_keep] those that do
        ggml_tensor * weights = nullptr;  // F32 [n_keep]
    };
    std::vector<part_t> parts(n_image);

    uint32_t first      = 0;  // of the image among the stage's visual tokens
    uint32_t first_orig = 0;  // and among all
    for (size_t i = 0; i < n_image; ++i) {
        const uint32_t n      = plan->counts[stage][i];
        const uint32_t n_keep = plan->counts[stage + 1][i];

        const auto of_image = [&](ggml_tensor * t) { return ggml_view_1d(ctx, t, n, first * ggml_element_size(t)); };

        auto & part = parts[i];
        if (n_keep > 0 && inp->weights) {
            part.weights = of_image(inp->weights);
        }
        if (n_keep > 0 && n_keep < n) {
            ggml_tensor * rows = view_rows(ctx, cur, plan->row(stage, i), n);
            ggml_tensor * direction =
                    schedule.merge || schedule.distance ?
                            directions(ctx, rows, inp->ctx->attn_norm(il + 1), g.hparams.f_norm_rms_eps) :
                            nullptr;

            ggml_tensor * rank = ggml_view_1d(ctx, bias, plan->spans[i].n, first_orig * ggml_element_size(bias));
            if (inp->ids[i]) {
                rank = as_vector(ctx, ggml_get_rows(ctx, as_column(ctx, rank), inp->ids[i]));
            }
            if (score) {
                ggml_tensor * own = of_image(score);
                rank              = ggml_add(ctx, schedule.distance ? by_distance(ctx, own, direction) : own, rank);
            }
            part.stay = top_k_in_order(ctx, rank, n_keep);

            if (schedule.merge) {
                part.owner = owners_of(ctx, direction, part.stay);

                const auto sum = [&](ggml_tensor * t) { return sum_by_owner(ctx, dev, t, part.owner, n_keep); };

                ggml_tensor * w = as_column(ctx, part.weights ? part.weights : filled(ctx, n, 1.0f));
                ggml_tensor * W = sum(w);
                part.rows       = ggml_div(ctx, sum(part.weights ? ggml_mul(ctx, rows, w) : rows), W);
                part.weights    = as_vector(ctx, W);
            } else {
                part.rows = ggml_get_rows(ctx, rows, part.stay);
            }
        }
        first += n;
        first_orig += plan->spans[i].n;
    }

    // The rows of t that stay; text_rows: t has the text's rows too, else the visual tokens' alone.
    const auto gather = [&](ggml_tensor * t, bool text_rows) {
        ggml_tensor * res = nullptr;

        const auto append = [&](ggml_tensor * part) { res = res ? ggml_concat(ctx, res, part, 1) : part; };

        uint32_t row = 0;
        for (size_t i = 0; i < n_image; ++i) {
            const uint32_t n      = plan->counts[stage][i];
            const uint32_t n_keep = plan->counts[stage + 1][i];
            const uint32_t begin  = text_rows ? plan->row(stage, i) : row;

            if (begin > row) {
                append(view_rows(ctx, t, row, begin - row));
            }
            if (n_keep > 0) {
                ggml_tensor * rows = view_rows(ctx, t, begin, n);
                append(!parts[i].stay ? rows : t == cur ? parts[i].rows : ggml_get_rows(ctx, rows, parts[i].stay));
            }
            row = begin + n;
        }
        if (row < t->ne[1]) {
            append(view_rows(ctx, t, row, t->ne[1] - row));
        }
        return res;
    };

    // for the host: the memory that must outlive the compute
    const auto report = [&](ggml_tensor * t) {
        ggml_set_output(t);
        if (t->view_src) {
            ggml_set_output(t->view_src);
        }
        ggml_build_forward_expand(g.gf, t);
    };

    plan->kept.emplace_back(n_image, nullptr);
    plan->owners.emplace_back(n_image, nullptr);
    for (size_t i = 0; i < n_image; ++i) {
        if (auto * stay = parts[i].stay) {
            inp->ids[i] = inp->ids[i] ? as_vector(ctx, ggml_get_rows(ctx, as_column(ctx, inp->ids[i]), stay)) : stay;
            report(inp->ids[i]);
        }
        plan->kept.back()[i] = inp->ids[i];

        if (auto * owner = parts[i].owner) {
            report(owner);
            plan->owners.back()[i] = owner;
        }
    }

    for (size_t i = 0; i < sums.size(); ++i) {
        if (plan->n_visual(stage + 1) == 0 || !schedule.terms[i].sum) {
            sums[i] = {};
        } else {
            sums[i].t = as_vector(ctx, gather(as_column(ctx, sums[i].t), false));
        }
    }

    inp->weights = nullptr;
    if (std::any_of(parts.begin(), parts.end(), [](const part_t & part) { return part.weights; })) {
        for (size_t i = 0; i < n_image; ++i) {
            const uint32_t n = plan->counts[stage + 1][i];
            if (n > 0) {
                ggml_tensor * w = parts[i].weights ? parts[i].weights : filled(ctx, n, 1.0f);
                inp->weights    = inp->weights ? ggml_concat(ctx, inp->weights, w, 0) : w;
            }
        }
        inp->add_weights(ctx, stage + 1);
    }

    inp_pos    = as_vector(ctx, gather(as_column(ctx, inp_pos), true));
    cur        = gather(cur, true);
    g.n_tokens = cur->ne[1];
    g.cb(cur, "st3_cut", il);
    return cur;
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
    const auto * inp = find_input(g);
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
    if (cur->ne[1] <= ST3_FFN_ROWS || !find_input(g)) {
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
    return 16 * (n_records + mem->n_stage()) * mem->n_seq_max +
           32 * (uint32_t) schedule.cuts.size() * mem->graph_images() *
                   (n_terms + (schedule.merge || schedule.distance ? 4 : 2)) +
           16 * schedule.n_layer * n_parts;
}

uint32_t st3_outputs_to_reserve(const llama_memory_i * memory, const llama_cparams & cparams, uint32_t n_outputs) {
    const auto * mem = dynamic_cast<const st3_memory *>(memory);
    return mem && !cparams.embeddings ? std::min(n_outputs, mem->n_seq_max) : n_outputs;  // pooling takes all rows
}
