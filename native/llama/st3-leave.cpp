// st3-leave.cpp - where visual tokens leave on the host: annealed while the answer grows, evicted after a question. The cut in the
// graph (st3-cut.cpp) is the twin of the latter.

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-memory.h"
#include "st3-owners.h"
#include "st3-rank.h"

#include <algorithm>
#include <memory>
#include <utility>

// What of an image's tokens `ids` is not among `kept` leaves its weight to the kept token that is most like it.
static void hand_over(
        std::vector<float> & weights, const std::vector<uint32_t> & ids, const std::vector<uint32_t> & kept,
        const st3_likeness & alike) {
    for (const uint32_t id : ids) {
        if (!std::binary_search(kept.begin(), kept.end(), id)) {
            weights[alike.nearest(id, kept)] += std::exchange(weights[id], 0.0f);
        }
    }
}

// Frees what is due at the start of a generated token's decode, so that the token can take a freed cell.
void st3_memory::anneal(llama_seq_id seq_id) {
    for (auto & image : images.of(seq_id)) {
        if (!image.pruned || image.n_steps % schedule.anneal_interval != 0) {
            continue;
        }
        const auto n = (uint32_t) image.places.size();
        image.alike.resize(n_stage());
        if (schedule.merge && image.weights.empty()) {
            image.weights.assign(n_stage(), std::vector<float>(n, 1.0f));
        }
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
            if (schedule.merge && n_keep > 0) {
                if (!alike || !alike->knows(there.ids)) {  // another sequence may have given tokens back (seq_cp)
                    alike = std::make_shared<st3_likeness>(compare(seq_id, s, there));
                }
                hand_over(image.weights[s], there.ids, kept, *alike);
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

// How alike the tokens are that a stage holds of an image. The rows of the residual stream are gone; the values that the stage's
// first layer made of them, which carry no position, are compared instead.
st3_likeness st3_memory::compare(llama_seq_id seq_id, uint32_t stage, const held_t & there) const {
    synchronize();
    return st3_compare(
            there.ids, stages[stage]->values(stages[stage]->get_stream(seq_id), there.cells), lctx->n_threads());
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
            const auto was  = std::exchange(ids, st3_highest(ids, rank, n_keep[s]));
            if (schedule.merge) {
                if (ids.empty()) {
                    weights.assign(weights.size(), 0.0f);
                } else if (ids.size() < was.size()) {
                    hand_over(weights, was, ids, compare(seq_id, s, left));
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
