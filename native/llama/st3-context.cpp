// st3-context.cpp - st3_memory_context: a batch on its way through the stages; and what is counted of it.

#include "st3-memory.h"

#include <algorithm>
#include <cmath>

st3_memory_context::st3_memory_context(st3_memory * mem, std::vector<llama_memory_context_ptr> stages) :
    status(LLAMA_MEMORY_STATUS_NO_UPDATE),
    mem(mem),
    stages(std::move(stages)) {
    for (const auto & s : this->stages) {
        status = llama_memory_status_combine(status, s->get_status());
    }
}

st3_memory_context::st3_memory_context(
        st3_memory * mem, std::vector<llama_kv_cache::slot_info_vec_t> slots_, std::vector<llama_ubatch> ubatches_,
        std::vector<st3_work> works_, std::unique_ptr<st3_plan> plan) :
    status(LLAMA_MEMORY_STATUS_SUCCESS),
    mem(mem),
    slots(std::move(slots_)),
    ubatches(std::move(ubatches_)),
    works(std::move(works_)),
    plan_(std::move(plan)) {
    for (uint32_t s = 0; s < slots.size(); ++s) {
        stages.push_back(std::make_unique<llama_kv_cache_context>(
                &mem->stage(s), slots[s], plan_ ? std::vector<llama_ubatch>{ plan_->ubatches[s] } : ubatches));
    }
}

const std::vector<st3_record> & st3_memory_context::records() const {
    static const std::vector<st3_record> none;

    return i_cur < works.size() ? works[i_cur].records : none;
}

// Adds bias to the element of a mask of a ubatch for a row and a cell.
static void add_to_mask(ggml_tensor * mask, uint32_t row, uint32_t cell, float bias) {
    const size_t at = row * mask->ne[0] + cell;
    if (mask->type == GGML_TYPE_F16) {
        auto & x = ((ggml_fp16_t *) mask->data)[at];
        x        = ggml_fp32_to_fp16(ggml_fp16_to_fp32(x) + bias);
    } else {
        ((float *) mask->data)[at] += bias;
    }
}

void st3_memory_context::add_weights(uint32_t stage, const llama_ubatch & ubatch, ggml_tensor * mask) const {
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[s];
        mem->each_weight(seq_id, stage, [&](uint32_t cell, float weight) {
            const float bias = std::log(weight);
            for (uint32_t row = 0; row < ubatch.n_tokens; ++row) {
                if (ubatch.seq_id[row][0] == seq_id) {  // which the mask is written for
                    add_to_mask(mask, row, cell, bias);
                }
            }
        });
    }
}

void st3_memory_context::see_ahead(uint32_t stage, ggml_tensor * mask) const {
    const auto & cells = row_cells(stage);
    for (size_t i = 0; i < plan_->spans.size(); ++i) {
        const uint32_t begin = plan_->row(stage, i);
        const uint32_t end   = begin + plan_->counts[stage][i];
        for (uint32_t row = begin; row < end && !plan_->spans[i].causal; ++row) {
            for (uint32_t later = row + 1; later < end; ++later) {
                const size_t at = row * mask->ne[0] + cells[later];
                if (mask->type == GGML_TYPE_F16) {
                    ((ggml_fp16_t *) mask->data)[at] = ggml_fp32_to_fp16(0.0f);
                } else {
                    ((float *) mask->data)[at] = 0.0f;
                }
            }
        }
    }
}

void st3_memory_context::add_window(uint32_t stage, const llama_ubatch & ubatch, ggml_tensor * mask) const {
    for (uint32_t row = 0; row < ubatch.n_tokens; ++row) {
        const llama_seq_id seq_id = ubatch.seq_id[row][0];
        for (const auto & [pos, cell] : mem->stage(stage).get_cells(seq_id).seq_pos_get(seq_id)) {
            if (ubatch.pos[row] - pos < mem->n_window()) {
                break;
            }
            add_to_mask(mask, row, cell, -INFINITY);
        }
    }
}

bool st3_memory_context::exceeds_window(const llama_ubatch & ubatch) const {
    if (works.empty()) {  // memory is asked for
        return mem->n_window() > 0;
    }
    for (uint32_t row = 0; row < ubatch.n_tokens && mem->n_window() > 0; ++row) {
        for (int32_t i = 0; i < ubatch.n_seq_id[row]; ++i) {
            const llama_seq_id seq_id = ubatch.seq_id[row][i];
            const llama_pos    first  = mem->seq_pos_min(seq_id);
            if (first >= 0 && ubatch.pos[row] - first >= mem->n_window()) {
                return true;
            }
        }
    }
    return false;
}

std::vector<float> st3_memory_context::cell_positions(uint32_t stage, int64_t n) const {
    const llama_seq_id seq_id = plan_->ubatches[0].seq_id[0][0];

    std::vector<float> res(n);
    for (const auto & [pos, cell] : mem->stage(stage).get_cells(seq_id).seq_pos_get(seq_id)) {
        if (cell < n) {
            res[cell] = (float) pos;
        }
    }
    return res;
}

bool st3_memory_context::next() {
    std::vector<llama_kv_cache::slot_info> cur;
    for (const auto & s : slots) {
        cur.push_back(s[i_cur]);
    }
    mem->finish(ubatches[i_cur], works[i_cur], plan_.get(), cur, out_, sched_);
    out_ = nullptr;

    for (auto & s : stages) {
        s->next();
    }
    if (++i_cur < ubatches.size()) {
        return true;
    }
    // not before: the cells of every ubatch were chosen when the batch began
    if (std::any_of(works.begin(), works.end(), [](const st3_work & work) { return !work.questions.empty(); })) {
        mem->trim();
    }
    return false;
}

bool st3_memory_context::apply() {
    bool res = true;
    for (auto & s : stages) {
        // an update context with nothing to do must not be applied
        if (s->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
            res = s->apply() && res;
        }
    }
    return res;
}

// Counts what a ubatch computed.
void st3_memory::take_account(const llama_ubatch & ubatch, const st3_work & work, const st3_plan * plan) {
    for (uint32_t i = 0; i < ubatch.n_seqs_unq; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[i];
        auto &             a      = accounts[seq_id];

        uint32_t n      = 0;
        bool     output = false;
        for (uint32_t row = 0; row < ubatch.n_tokens; ++row) {
            const auto * ids = ubatch.seq_id[row];
            if (std::find(ids, ids + ubatch.n_seq_id[row], seq_id) != ids + ubatch.n_seq_id[row]) {
                n++;
                output |= ubatch.output[row] != 0;
            }
        }
        if (!a.open && std::count(work.steps.begin(), work.steps.end(), seq_id) > 0) {
            continue;  // a generated token
        }
        if (!a.open) {
            a.n_rows     = 0;
            a.pairs_full = 0;
            a.rows.assign(n_stage(), 0);
            a.pairs.assign(n_stage(), 0);
            if (!plan) {
                a.kept.clear();
                a.owners.clear();
                a.first.clear();
            }
        }
        const auto pairs = [](double n_rows, double n_before) { return n_rows * n_before + n_rows * (n_rows + 1) / 2; };

        a.n_rows += n;
        a.pairs_full += pairs(n, (double) n_given(seq_id) - n);
        for (uint32_t s = 0; s < n_stage(); ++s) {
            const uint32_t n_rows = plan ? plan->n_rows(s) : n;
            const auto     n_held = (uint32_t) stages[s]->get_cells(seq_id).seq_pos_get(seq_id).size();
            a.rows[s] += n_rows;
            a.pairs[s] += pairs(n_rows, n_held - std::min(n_held, n_rows));
        }
        a.open   = !output;
        last_seq = seq_id;
    }
}
