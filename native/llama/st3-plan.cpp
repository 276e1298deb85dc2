#include "st3-plan.h"

#include <numeric>

uint32_t st3_plan::row(uint32_t stage, size_t image) const {
    uint32_t res = spans[image].row;
    for (size_t i = 0; i < image; ++i) {
        res -= spans[i].n - counts[stage][i];
    }
    return res;
}

uint32_t st3_plan::n_visual(uint32_t stage) const {
    return std::accumulate(counts[stage].begin(), counts[stage].end(), 0u);
}

uint32_t st3_plan::last_row(uint32_t row) const {
    uint32_t res = row;
    for (size_t i = 0; i < spans.size(); ++i) {
        if (spans[i].row < row) {
            res -= spans[i].n - counts.back()[i];
        }
    }
    return res;
}

// The rows of a one-sequence ubatch that remain when image i keeps counts[i] tokens. Which tokens these are is not known
// yet: cells and mask depend on their number and order only, so the first places of each image stand in.
static llama_ubatch
shorten(const llama_ubatch & src, const std::vector<st3_span> & spans, const std::vector<uint32_t> & counts) {
    auto data = std::make_shared<llama_ubatch::data_t>();

    std::vector<uint32_t> rows;

    data->seq_id_data = { src.seq_id[0][0] };
    data->seq_id_unq  = { src.seq_id_unq, src.seq_id_unq + src.n_seqs_unq };
    data->seq_idx     = { src.seq_idx, src.seq_idx + LLAMA_MAX_SEQ };

    size_t i_span = 0;
    for (uint32_t i = 0; i < src.n_tokens; ++i) {
        while (i_span < spans.size() && i >= spans[i_span].row + spans[i_span].n) {
            i_span++;
        }
        if (i_span < spans.size() && i >= spans[i_span].row + counts[i_span]) {
            continue;
        }
        rows.push_back(i);
        data->output.push_back(src.output[i]);
    }
    for (uint32_t section = 0; section < src.n_pos; ++section) {
        for (const uint32_t i : rows) {
            data->pos.push_back(src.pos[section * src.n_tokens + i]);
        }
    }

    const uint32_t n = (uint32_t) rows.size();
    data->n_seq_id.assign(n, 1);
    data->seq_id.assign(n, data->seq_id_data.data());

    llama_ubatch res = src;
    res.n_tokens     = n;
    res.n_seq_tokens = src.n_seqs == src.n_tokens ? 1 : n;  // of a unified cache each row counts as a sequence
    res.n_seqs       = n / res.n_seq_tokens;
    res.token        = nullptr;
    res.embd         = nullptr;
    res.pos          = data->pos.data();
    res.n_seq_id     = data->n_seq_id.data();
    res.seq_id       = data->seq_id.data();
    res.seq_id_unq   = data->seq_id_unq.data();
    res.seq_idx      = data->seq_idx.data();
    res.output       = data->output.data();
    res.data         = std::move(data);
    return res;
}

std::unique_ptr<st3_plan> st3_make_plan(
        const st3_schedule & schedule, std::vector<st3_span> spans, uint32_t number, const llama_ubatch & ubatch) {
    auto plan    = std::make_unique<st3_plan>();
    plan->spans  = spans;
    plan->n_text = ubatch.n_tokens - (spans.back().row + spans.back().n);
    plan->number = number;

    for (uint32_t s = 0; s < schedule.n_stage(); ++s) {
        std::vector<uint32_t> held;
        for (const auto & span : spans) {
            held.push_back(schedule.counts(span.n)[s]);
        }
        plan->ubatches.push_back(s == 0 ? ubatch : shorten(ubatch, spans, held));
        plan->counts.push_back(std::move(held));
    }
    return plan;
}
