// st3-leave.cpp - where visual tokens leave on the host: annealed while the answer grows, evicted after a question. The cut in the
// graph (st3-cut.cpp) is the twin of the latter.

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-likeness.h"
#include "st3-memory.h"
#include "st3-rank.h"

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

// Frees what is due at the start of a generated token's decode, so that the token can take a freed cell.
void st3_memory::anneal(llama_seq_id seq_id) {
    if (!schedule.anneals()) {
        return;
    }
    for (auto & image : images.of(seq_id)) {
        if (!image.pruned || image.n_steps % schedule.anneal_interval != 0) {
            continue;
        }
        const auto n = (uint32_t) image.places.size();
        image.alike.resize(n_stage());
        for (uint32_t s = 0; s < n_stage(); ++s) {
            const uint32_t n_keep = schedule.target(n, image.n0[s], image.n_steps + schedule.anneal_interval);

            auto &     alike = image.alike[s];
            const auto there = held(seq_id, image, s);
            if (there.ids.size() <= schedule.last_target(n, image.n0[s])) {
                alike.reset();  // no more will leave
            }
            if (there.ids.size() <= n_keep) {
                continue;
            }
            absorb();

            auto rank = schedule.bias(image.nx, image.ny, n_keep, image.number, schedule.anneal_random);
            if (!image.scores.empty()) {
                for (size_t i = 0; i < rank.size(); ++i) {
                    rank[i] += image.scores[s][i] / image.n_records;
                }
            }
            const auto kept = st3_highest(there.ids, rank, n_keep);
            if (schedule.merge && n_keep > 0 && !hand_over(seq_id, s, there, kept, image.weights[s], &alike)) {
                continue;  // they leave at another step
            }
            drop(seq_id, s, there, kept);
        }
    }
}

void st3_memory::drop(llama_seq_id seq_id, uint32_t stage, const held_t & there, const std::vector<uint32_t> & kept) {
    for (size_t i = 0; i < there.ids.size(); ++i) {
        if (!std::binary_search(kept.begin(), kept.end(), there.ids[i])) {
            stages[stage]->remove(seq_id, there.cells[i]);
        }
    }
}

std::vector<float> st3_memory::values(llama_seq_id seq_id, uint32_t stage, const std::vector<uint32_t> & cells) const {
    synchronize();
    return stages[stage]->values(stages[stage]->get_stream(seq_id), cells);
}

bool st3_memory::hand_over(
        llama_seq_id seq_id, uint32_t stage, const held_t & there, const std::vector<uint32_t> & kept,
        std::vector<float> & weights, std::shared_ptr<const st3_likeness> * alike) const {
    const int n_threads = (int) lctx->n_threads();

    std::vector<std::pair<uint32_t, uint32_t>> heirs;  // of each that leaves
    held_t                                     stay;
    held_t                                     strays;  // that leave with all that are much like them

    try {
        if (alike && !*alike) {
            const auto rows = values(seq_id, stage, there.cells);
            const auto n    = there.ids.size();
            *alike          = std::make_shared<const st3_likeness>(there.ids, st3_cosines(rows, n, rows, n, n_threads));
        }
        for (size_t i = 0; i < there.ids.size(); ++i) {
            const uint32_t id    = there.ids[i];
            const bool     stays = std::binary_search(kept.begin(), kept.end(), id);
            const uint32_t heir  = stays || !alike ? st3_likeness::NONE : (*alike)->nearest(id, kept);
            if (heir != st3_likeness::NONE) {
                heirs.emplace_back(id, heir);
            } else {
                auto & to = stays ? stay : strays;
                to.ids.push_back(id);
                to.cells.push_back(there.cells[i]);
            }
        }
        if (!strays.ids.empty()) {
            const size_t n       = stay.ids.size();
            const auto   cosines = st3_cosines(
                      values(seq_id, stage, strays.cells), strays.ids.size(), values(seq_id, stage, stay.cells), n,
                      n_threads);
            for (size_t i = 0; i < strays.ids.size(); ++i) {
                const auto row = cosines.begin() + i * n;
                heirs.emplace_back(strays.ids[i], stay.ids[std::max_element(row, row + n) - row]);
            }
        }
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_WARN("%s: no memory to compare an image's tokens\n", __func__);
        return false;
    }
    for (const auto & [id, heir] : heirs) {
        weights[heir] += std::exchange(weights[id], 0.0f);
    }
    return true;
}

// Cuts down the images of a sequence that wait for it, as the cuts of a pruned prefill would.
void st3_memory::evict(llama_seq_id seq_id) {
    absorb();

    const auto cut = std::move(cut_scores[seq_id]);
    cut_scores.erase(seq_id);

    auto & list = images.of(seq_id);
    for (uint32_t i_image = 0; i_image < list.size(); ++i_image) {
        auto & image = list[i_image];
        if (image.pruned) {
            continue;
        }
        const auto n_keep = schedule.counts((uint32_t) image.places.size());

        auto ids = held(seq_id, image, 0).ids;
        image.n0 = { (uint32_t) ids.size() };

        std::vector<float> weights(image.places.size());
        for (const uint32_t id : ids) {
            weights[id] = 1.0f;
        }
        if (schedule.merge) {
            image.weights = { weights };
        }
        for (uint32_t s = 1; s < n_stage(); ++s) {
            auto rank = schedule.bias(image.nx, image.ny, n_keep[s], image.number, schedule.random);
            for (size_t i = 0; i < cut.tokens.size(); ++i) {
                if (cut.tokens[i].image == i_image) {
                    rank[cut.tokens[i].index] += cut.scores[s - 1][i];
                }
            }
            drop(seq_id, s, held(seq_id, image, s), ids);  // what left before
            const auto left = held(seq_id, image, s);
            ids             = st3_highest(left.ids, rank, n_keep[s]);
            if (schedule.merge) {
                if (ids.empty()) {
                    weights.assign(weights.size(), 0.0f);
                } else if (ids.size() < left.ids.size()) {
                    hand_over(seq_id, s, left, ids, weights, nullptr);
                }
                image.weights.push_back(weights);
            }
            drop(seq_id, s, left, ids);
            image.n0.push_back((uint32_t) ids.size());
        }
        image.pruned  = true;
        image.evicted = true;
    }
}
