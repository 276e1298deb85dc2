#include "st3-graph-input.h"

#include "llama-impl.h"
#include "st3-ops.h"

#include <algorithm>
#include <cstring>
#include <map>

using namespace st3_ops;

st3_graph_input::st3_graph_input(const llm_graph_context & g, const st3_memory_context * ctx) :
    llm_graph_input_attn_kv(g.hparams, g.cparams, ctx->stage(0)),
    ctx(ctx),
    sched(g.sched),
    generation(ctx->generation()),
    planned(ctx->plan()),
    windows(ctx->exceeds_window(g.ubatch)) {
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
        stage_t stage;
        stage.host = std::move(inp);
        if (windows && planned && s > 0) {  // the host does not know the positions of the rows that stay
            stage.cell_pos  = add(ggml_new_tensor_1d(g.ctx0, GGML_TYPE_F32, mctx_s->get_n_kv()));
            stage.row_cells = add(ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, ubatch.n_tokens));
        } else if (windows) {
            stage.window_mask = add(ggml_dup_tensor(g.ctx0, stage.host->self_kq_mask));
        }
        stages.push_back(std::move(stage));
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
    layout = st3_layout(ctx->records(), (uint32_t) schedule.cuts.size());
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
            if (windows) {
                stage.window[place]                   = std::make_unique<llm_graph_input_attn_kv>(*inp);
                stage.window[place]->self_kq_mask     = at(stage.window_mask);
                stage.window[place]->self_kq_mask_cnv = at(stage.window_mask);
            }
            stage.graph[place] = std::move(inp);
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
        auto * mask = stages[s].host->self_kq_mask;
        if (mask->data) {
            if (planned) {
                ctx->see_ahead(s, mask);
            }
            ctx->add_weights(s, rows, mask);
            if (auto * window = stages[s].window_mask) {
                memcpy(window->data, mask->data, ggml_nbytes(mask));
                ctx->add_window(s, rows, window);
            }
        }
        if (stages[s].cell_pos) {
            set(stages[s].cell_pos, ctx->cell_positions(s, stages[s].cell_pos->ne[0]).data());
            set(stages[s].row_cells, ctx->row_cells(s).data());
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
        recorders.size() != next->records().size() || windows != next->exceeds_window(params.ubatch)) {
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

st3_graph_input * st3_find_input(const llm_graph_context & g) {
    for (auto & inp : g.res->inputs) {
        if (auto * st3 = dynamic_cast<st3_graph_input *>(inp.get())) {
            return st3;
        }
    }
    return nullptr;
}

ggml_tensor * st3_mean(ggml_context * ctx, const std::vector<st3_graph_input::sum_t> & terms) {
    ggml_tensor * res = nullptr;
    for (const auto & term : terms) {
        ggml_tensor * t = ggml_scale(ctx, term.t, 1.0f / float(term.n_layers * terms.size()));
        res             = res ? ggml_add(ctx, res, t) : t;
    }
    return res;
}
