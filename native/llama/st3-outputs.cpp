// st3-outputs.cpp - outputs of a batch that was computed in several.

#include "st3-seam.h"

#include <algorithm>
#include <new>
#include <utility>

// Outputs of row first + i of what was computed are those of rows[i] of the batch.
void st3_seam::renumber(const std::vector<size_t> & rows, size_t first) {
    std::vector<int32_t> ids(ctx.output_ids.size(), -1);
    for (size_t i = 0; i < rows.size(); ++i) {
        ids[rows[i]] = ctx.output_ids[first + i];
    }
    ctx.output_ids = std::move(ids);
}

// Copies them, by row of the batch, before the next compute takes their place.
void st3_seam::take_outputs(const std::vector<size_t> & rows, size_t first, std::map<size_t, std::vector<float>> & to) {
    const size_t n_vocab = ctx.model.vocab.n_tokens();

    ctx.synchronize();
    ctx.output_reorder();
    for (size_t i = 0; i < rows.size(); ++i) {
        if (const int32_t id = ctx.output_ids[first + i]; id >= 0) {
            const float * data = ctx.logits.data + id * n_vocab;
            to[rows[i]].assign(data, data + n_vocab);
        }
    }
}

void st3_seam::put_outputs(const std::map<size_t, std::vector<float>> & outputs) {
    if (ctx.output_reserve((int32_t) outputs.size()) < outputs.size()) {
        throw std::bad_alloc();
    }
    float * data = ctx.logits.data;
    for (const auto & [row, logits] : outputs) {
        ctx.output_ids[row] = (int32_t) ctx.n_outputs++;
        data                = std::copy(logits.begin(), logits.end(), data);
    }
}
