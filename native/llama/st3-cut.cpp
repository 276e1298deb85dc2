// st3-cut.cpp - the cut at the end of a layer: ranks, selects, merges and gathers rows with stock ops.

#include "st3-graph-input.h"
#include "st3-graph.h"
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

ggml_tensor * st3_cut(llm_graph_context & g, ggml_tensor * cur, ggml_tensor *& inp_pos, int il) {
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
