// st3-scores.h - what ubatches record of the attention that visual tokens get.
#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

constexpr uint32_t ST3_MAX_TEXT_ROWS = 512;  // scoring queries of text at most: the newest

// A visual token by its place among a sequence's images.
struct st3_token {
    uint32_t image;
    uint32_t index;
};

// What a ubatch records for one sequence: the attention that its newest rows pay to visual tokens. Tokens that wait for
// their cuts ("fresh": of a plan, or of images that came by ordinary batches) come first in every stage.
struct st3_record {
    llama_seq_id seq_id   = 0;
    uint32_t     n_rows   = 0;      // scoring rows for "text" terms, the last of them for "last" terms
    uint32_t     from_end = 0;      // rows of the ubatch after them
    uint32_t     stream   = 0;      // counted from the ubatch's first
    bool         anneal   = false;  // a score for each stage is wanted
    bool         cut = false;  // a score for each cut is wanted: of the fresh tokens, which are the same in all stages

    std::vector<uint32_t>               n_fresh;  // [stage]
    std::vector<uint32_t>               n_ids;    // [stage] cells to read, padded so that graphs can be used again
    std::vector<std::vector<uint32_t>>  cells;    // [stage] the cells of tokens
    std::vector<std::vector<st3_token>> tokens;   // [stage] (a plan's fresh ones are put in after the compute)

    // Whether a graph made for the other one serves this one too.
    bool same_graph(const st3_record & o) const {
        return n_rows == o.n_rows && from_end == o.from_end && stream == o.stream && anneal == o.anneal && !cut &&
               !o.cut && n_ids == o.n_ids;
    }
};

// Scores of one record in one stage: annealing's of all its tokens, padding included, or a cut's of the fresh ones.
struct st3_score_part {
    uint32_t stage;
    uint32_t record;
    bool     cut;
    uint32_t n;
};

// How the scores of records, F32, follow each other in what a graph gives the host: as the stages are computed. The graph writes by
// it (st3_record_attention) and the memory reads by it (st3_memory::absorb).
std::vector<st3_score_part> st3_layout(const std::vector<st3_record> & records, uint32_t n_cuts);
