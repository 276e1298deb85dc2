// st3-scores.cpp - the records of st3_memory: made before a ubatch is computed, collected and absorbed afterwards.

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-memory.h"

#include <algorithm>
#include <cmath>

static constexpr uint32_t PAD_IDS = 32;

std::vector<st3_score_part> st3_layout(const std::vector<st3_record> & records, uint32_t n_cuts) {
    std::vector<st3_score_part> res;
    for (uint32_t s = 0; s <= n_cuts; ++s) {
        for (uint32_t r = 0; r < records.size(); ++r) {
            if (records[r].anneal && records[r].n_ids[s] > 0) {
                res.push_back({ s, r, false, records[r].n_ids[s] });
            }
            if (records[r].cut && records[r].n_fresh[s] > 0 && s < n_cuts) {
                res.push_back({ s, r, true, records[r].n_fresh[s] });
            }
        }
    }
    return res;
}

// cut: the sequence's waiting images are cut down after this ubatch.
st3_record st3_memory::make_record(const llama_ubatch & ubatch, llama_seq_id seq_id, bool cut) const {
    const auto has_seq = [&](uint32_t row) {
        return std::find(ubatch.seq_id[row], ubatch.seq_id[row] + ubatch.n_seq_id[row], seq_id) !=
               ubatch.seq_id[row] + ubatch.n_seq_id[row];
    };
    st3_record res;
    res.seq_id = seq_id;

    uint32_t end = ubatch.n_tokens;
    while (!has_seq(end - 1)) {
        end--;
    }
    uint32_t begin = end - 1;
    while (begin > 0 && has_seq(begin - 1)) {
        begin--;
    }
    res.n_rows   = std::min(end - begin, ST3_MAX_TEXT_ROWS);
    res.from_end = ubatch.n_tokens - end;
    if (!unified) {
        const auto * first = std::min_element(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq);
        res.stream         = seq_id - *first;
    }

    // what every stage holds of the images in question, those that wait for their cuts first
    struct share_t {
        uint32_t            image;
        std::vector<held_t> held;  // [stage]
    };
    const auto &         list = images.of(seq_id);
    std::vector<share_t> shares;
    size_t               n_waiting = 0;
    for (const bool waiting : { true, false }) {
        for (uint32_t i = 0; i < list.size(); ++i) {
            if (list[i].pruned == waiting || (waiting ? !cut : !schedule.anneals())) {
                continue;
            }
            share_t share = { i, {} };
            bool    more  = waiting;  // whether it will lose any more tokens
            for (uint32_t s = 0; s < n_stage(); ++s) {
                share.held.push_back(held(seq_id, list[i], s));
                more |= !waiting && share.held[s].ids.size() >
                                            schedule.last_target((uint32_t) list[i].places.size(), list[i].n0[s]);
            }
            if (more) {
                shares.push_back(std::move(share));
                n_waiting += waiting;
            }
        }
    }
    res.cut    = n_waiting > 0 && !schedule.terms.empty() && !schedule.cuts.empty();
    res.anneal = !shares.empty() && schedule.anneals() && !schedule.anneal_terms.empty();

    for (uint32_t s = 0; s < n_stage(); ++s) {
        res.cells.emplace_back();
        res.tokens.emplace_back();
        res.n_fresh.push_back(0);

        uint32_t n_ids = 0;
        for (size_t i = 0; i < shares.size() && (res.anneal || i < n_waiting); ++i) {
            const auto & h = shares[i].held[s];
            res.cells[s].insert(res.cells[s].end(), h.cells.begin(), h.cells.end());
            for (const uint32_t id : h.ids) {
                res.tokens[s].push_back({ shares[i].image, id });
            }
            res.n_fresh[s] += i < n_waiting ? (uint32_t) h.ids.size() : 0;
            // what is held falls and n0 does not, so that graphs can be used again; n0 may come from a saved state
            n_ids += (uint32_t) std::max<size_t>(h.ids.size(), i < n_waiting ? 0 : list[shares[i].image].n0[s]);
        }
        res.n_ids.push_back(GGML_PAD(n_ids, PAD_IDS));
    }
    return res;
}

// Of a plan: its visual tokens come before those that were there.
st3_record
st3_memory::make_record(const st3_plan & plan, const std::vector<llama_kv_cache::slot_info_vec_t> & slots) const {
    const auto & ubatch = plan.ubatches[0];

    auto res   = make_record(ubatch, ubatch.seq_id[0][0], false);
    res.n_rows = std::clamp(plan.n_text, 1u, ST3_MAX_TEXT_ROWS);
    res.anneal = schedule.anneals() && !schedule.anneal_terms.empty();
    for (uint32_t s = 0; s < n_stage(); ++s) {
        std::vector<uint32_t> fresh;
        for (size_t i = 0; i < plan.spans.size(); ++i) {
            const auto first = slots[s][0].idxs[0].begin() + plan.row(s, i);
            fresh.insert(fresh.end(), first, first + plan.counts[s][i]);
        }
        res.n_fresh[s] = (uint32_t) fresh.size();
        res.cells[s].insert(res.cells[s].begin(), fresh.begin(), fresh.end());
        res.n_ids[s] = (uint32_t) res.cells[s].size();
    }
    return res;
}

// Has a ubatch's scores brought to the host, and does not wait for them.
void st3_memory::collect(std::vector<st3_record> records, ggml_tensor * out, ggml_backend_sched_t sched) {
    const size_t n_bytes = ggml_nbytes(out);

    ggml_backend_buffer_ptr buf;
    const auto              fits = [=](const auto & b) { return ggml_backend_buffer_get_size(b.get()) >= n_bytes; };
    if (const auto it = std::find_if(spare.begin(), spare.end(), fits); it != spare.end()) {
        buf = std::move(*it);
        spare.erase(it);
    } else {
        spare.clear();  // too small by now, all of them
        // a copy from a device waits for it unless the host's memory is pinned
        const auto dev  = model.dev_output();
        const auto buft = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr;
        buf.reset(ggml_backend_buft_alloc_buffer(buft ? buft : ggml_backend_cpu_buffer_type(), n_bytes));
        if (!buf) {  // nobody above llama_decode would catch an exception; ranks go by what other steps recorded
            LLAMA_LOG_WARN("%s: no memory for the scores of a step\n", __func__);
            return;
        }
    }
    ggml_backend_tensor_get_async(
            ggml_backend_sched_get_tensor_backend(sched, out), out, ggml_backend_buffer_get_base(buf.get()), 0,
            n_bytes);
    pending.push_back({ std::move(records), std::move(buf), (size_t) ggml_nelements(out) });

    if (pending.size() >= 64) {
        absorb();
    }
}

// Adds the scores that are on their way to the images'.
void st3_memory::absorb() {
    if (pending.empty()) {
        return;
    }
    synchronize();

    const auto finite = [](float x) { return std::isfinite(x) ? x : 0.0f; };  // NaN has no rank

    for (auto & p : pending) {
        const float * data = (const float *) ggml_backend_buffer_get_base(p.buf.get());
        const float * end  = data + p.n;

        for (const auto & part : st3_layout(p.records, (uint32_t) schedule.cuts.size())) {
            const auto & record = p.records[part.record];
            const auto & tokens = record.tokens[part.stage];
            if (part.cut) {
                auto & cut = cut_scores[record.seq_id];
                cut.tokens.assign(tokens.begin(), tokens.begin() + part.n);
                cut.scores.emplace_back(part.n);
                std::transform(data, data + part.n, cut.scores.back().begin(), finite);
            } else {
                for (size_t i = 0; i < tokens.size(); ++i) {
                    auto & image = images.of(record.seq_id)[tokens[i].image];
                    if (image.scores.empty()) {
                        image.scores.assign(n_stage(), std::vector<float>(image.places.size()));
                    }
                    image.scores[part.stage][tokens[i].index] += finite(data[i]);
                }
            }
            data += part.n;
        }
        GGML_ASSERT(data == end);

        for (const auto & record : p.records) {
            if (record.anneal) {
                std::vector<bool> seen(images.of(record.seq_id).size());
                for (const auto & tokens : record.tokens) {
                    for (const auto & token : tokens) {
                        seen[token.image] = true;
                    }
                }
                for (size_t i = 0; i < seen.size(); ++i) {
                    images.of(record.seq_id)[i].n_records += seen[i];
                }
            }
        }
        spare.push_back(std::move(p.buf));
    }
    pending.clear();
}
