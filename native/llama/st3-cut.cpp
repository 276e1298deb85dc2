// st3-cut.cpp - the cut at the end of a layer: ranks, selects, merges and gathers rows with stock ops.

#include "llama-model.h"
#include "st3-graph-input.h"
#include "st3-ops.h"

#include <algorithm>

using namespace st3_ops;

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

// What the attention of layer il sees of rows F32 [n_embd, n].
static ggml_tensor * seen_by(const llm_graph_context & g, const llama_layer & layer, ggml_tensor * rows, int il) {
    const auto norm = layer.attn_norm_b ? LLM_NORM : LLM_NORM_RMS;

    return g.build_norm(rows, layer.attn_norm, layer.attn_norm_b, norm, il);
}

void st3_graph_input::add_windows(ggml_context * ctx0, uint32_t stage, ggml_tensor * pos) {
    if (!windows) {
        return;
    }
    for (const int place : { HOST, DEVICE }) {
        auto &        inp  = *stages[stage].graph[place];
        ggml_tensor * mask = inp.self_kq_mask;
        const int64_t n_kv = mask->ne[0];
        const int64_t n    = mask->ne[1];

        ggml_tensor * of_row  = ggml_cast(ctx0, first_of(ctx0, pos, n), GGML_TYPE_F32);
        ggml_tensor * of_cell = ggml_cont(ctx0, as_column(ctx0, slices.at(stages[stage].cell_pos)[place]));
        of_cell = ggml_set_rows(ctx0, of_cell, as_column(ctx0, of_row), slices.at(stages[stage].row_cells)[place]);

        // 1 where the row's position is less than the window after the cell's; 0 in the mask, and else minus infinity
        ggml_tensor * ahead =
                ggml_sub(ctx0, ggml_repeat_4d(ctx0, as_vector(ctx0, of_cell), n_kv, n, 1, 1), as_column(ctx0, of_row));
        ahead = ggml_step(ctx0, ggml_scale_bias(ctx0, ahead, 1.0f, (float) hparams.n_swa));

        auto & window           = *stages[stage].window[place];
        window.self_kq_mask     = ggml_add(ctx0, mask, ggml_cast(ctx0, ggml_log(ctx0, ahead), mask->type));
        window.self_kq_mask_cnv = window.self_kq_mask;
    }
}

ggml_tensor *
st3_cut(llm_graph_context & g, ggml_tensor * cur, ggml_tensor *& inp_pos, int il, ggml_tensor ** inp_scale) {
    auto * inp  = st3_find_input(g);
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
    ggml_tensor * score = plan->n_visual(stage) > 0 ? st3_mean(ctx, sums) : nullptr;

    // What becomes of each image's rows; null where none or all of them stay.
    struct part_t {
        ggml_tensor * stay    = nullptr;  // I32 [n_keep] those that do, counted from the image's first
        ggml_tensor * owner   = nullptr;  // I32 [n]
        ggml_tensor * before  = nullptr;  // F32 [1, n] weights that were
        ggml_tensor * weights = nullptr;  // F32 [n_keep] and are
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
            ggml_tensor * rows      = view_rows(ctx, cur, plan->row(stage, i), n);
            ggml_tensor * direction = schedule.merge || schedule.distance ?
                                              directions(ctx, seen_by(g, inp->ctx->layer(il + 1), rows, il + 1)) :
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
                part.owner         = owners_of(ctx, direction, part.stay);
                part.before        = part.weights ? as_column(ctx, part.weights) : nullptr;
                ggml_tensor * ones = part.before ? part.before : as_column(ctx, filled(ctx, n, 1.0f));
                part.weights       = as_vector(ctx, sum_by_owner(ctx, dev, ones, part.owner, n_keep));
            }
        }
        first += n;
        first_orig += plan->spans[i].n;
    }

    // What stays of an image's rows F32 [m, n]: of what is seen of the tokens, weighted means of those that each stands for.
    const auto merged = [&](const part_t & part, ggml_tensor * rows) {
        if (!part.owner) {
            return ggml_get_rows(ctx, rows, part.stay);
        }
        ggml_tensor * sum = part.before ? ggml_mul(ctx, rows, part.before) : rows;
        return ggml_div(ctx, sum_by_owner(ctx, dev, sum, part.owner, part.stay->ne[0]), as_column(ctx, part.weights));
    };

    // The rows of t that stay. text_rows: t has the text's rows too, else the visual tokens' alone; seen: they are merged.
    const auto gather = [&](ggml_tensor * t, bool text_rows, bool seen = false) {
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
                append(!parts[i].stay ? rows : seen ? merged(parts[i], rows) : ggml_get_rows(ctx, rows, parts[i].stay));
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

    const int64_t n_pos = g.hparams.n_pos_per_embd();
    if (inp_pos && n_pos > 1) {
        ggml_tensor * pos = ggml_reshape_2d(ctx, inp_pos, g.n_tokens, n_pos);
        pos               = gather(ggml_cont(ctx, ggml_transpose(ctx, pos)), true);
        inp_pos           = as_vector(ctx, ggml_cont(ctx, ggml_transpose(ctx, pos)));
    } else if (inp_pos) {
        inp_pos = as_vector(ctx, gather(as_column(ctx, inp_pos), true));
    }
    if (inp_scale && *inp_scale) {
        ggml_tensor * scale = gather(ggml_reshape_2d(ctx, *inp_scale, 1, (*inp_scale)->ne[2]), true);
        *inp_scale          = ggml_reshape_3d(ctx, scale, 1, 1, scale->ne[1]);
    }
    inp->add_windows(ctx, stage + 1, inp_pos);
    if (g.hparams.n_deepstack_layers > 0) {
        // what the layers to come add to the rows lies behind the rows' own input
        ggml_tensor * in  = g.res->t_inp_embd;
        in                = gather(ggml_view_2d(ctx, in, g.hparams.n_embd_inp(), g.n_tokens, in->nb[1], 0), true, true);
        g.res->t_inp_embd = ggml_view_2d(ctx, in, g.hparams.n_embd, in->ne[1], in->nb[1], 0);
    }
    cur        = gather(cur, true, true);
    g.n_tokens = cur->ne[1];
    g.cb(cur, "st3_cut", il);
    return cur;
}
