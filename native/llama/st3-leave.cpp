// st3-leave.cpp - where visual tokens leave on the host: annealed while the answer grows, evicted after a question. The cut in the
// graph (st3-cut.cpp) is the twin of the latter.

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-memory.h"
#include "st3-owners.h"
#include "st3-rank.h"

#include <algorithm>
#include <cmath>
#include <utility>

// Frees what is due at the start of a generated token's decode, so that the token can take a freed cell.
void st3_memory::anneal(llama_seq_id seq_id) {
    for (const auto & image : images.of(seq_id)) {
        if (!image.pruned || image.n_steps % schedule.anneal_interval != 0) {
            continue;
        }
        for (uint32_t s = 0; s < n_stage(); ++s) {
            const uint32_t n_keep = schedule.target(
                    (uint32_t) image.places.size(), image.n0[s], image.n_steps + schedule.anneal_interval);

            const auto there = held(seq_id, image, s);
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
            drop(seq_id, s, there, st3_highest(there.ids, rank, n_keep));
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

// The place among `kept` of the owner of each of an image's tokens `ids`, as st3_owners::cut takes it. The rows of the residual
// stream are gone; the values that a stage's first layer made of them, which carry no position, are compared instead.
std::vector<int32_t> st3_memory::nearest(
        llama_seq_id seq_id, uint32_t stage, const held_t & there, const std::vector<uint32_t> & ids,
        const std::vector<uint32_t> & kept) const {
    if (kept.empty() || kept.size() == ids.size()) {
        return {};
    }
    std::vector<uint32_t> cells, rows;
    for (size_t i = 0; i < there.ids.size(); ++i) {
        if (std::binary_search(ids.begin(), ids.end(), there.ids[i])) {
            if (std::binary_search(kept.begin(), kept.end(), there.ids[i])) {
                rows.push_back((uint32_t) cells.size());
            }
            cells.push_back(there.cells[i]);
        }
    }
    synchronize();
    auto         values = stages[stage]->values(stages[stage]->get_stream(seq_id), cells);
    const size_t width  = values.size() / cells.size();
    return st3_nearest(std::move(values), width, rows);
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

        st3_owners stand_in((uint32_t) image.places.size(), { ids.begin(), ids.end() });
        if (schedule.merge) {
            image.weights = { stand_in.weights() };
        }
        for (uint32_t s = 1; s < n_stage(); ++s) {
            auto rank = schedule.bias(image.nx, image.ny, n_keep[s], image.number, schedule.random);
            for (size_t i = 0; i < cut.tokens.size(); ++i) {
                if (cut.tokens[i].image == i_image) {
                    rank[cut.tokens[i].index] += cut.scores[s - 1][i];
                }
            }
            const auto was = std::exchange(ids, st3_highest(ids, rank, n_keep[s]));

            const auto before = held(seq_id, image, s);
            if (schedule.merge) {
                stand_in.cut({ ids.begin(), ids.end() }, nearest(seq_id, s, before, was, ids));
                image.weights.push_back(stand_in.weights());
            }
            drop(seq_id, s, before, ids);
            image.n0.push_back((uint32_t) ids.size());
        }
        image.pruned  = true;
        image.evicted = true;
    }
}
