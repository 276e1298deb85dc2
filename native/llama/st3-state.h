// st3-state.h - what a context remembers of its last st3_prefill.
#pragma once

#include "st3.h"

#include <string>
#include <vector>

struct st3_state {
    st3_mode     mode = ST3_MODE_OFF;
    std::string  reason;  // why not pruned in the prefill although asked for
    llama_seq_id seq_id = 0;

    // what that prefill computed, and what was there before
    std::vector<uint32_t> rows;        // [layer] positions computed
    uint32_t              n_rows = 0;  // of the prompt
    std::vector<uint32_t> before;      // [layer] cells of the sequence
    llama_pos             p0 = 0;

    // all images of the sequence after it
    std::vector<uint32_t>              images;     // [image] visual tokens given
    std::vector<std::vector<uint32_t>> counts;     // [cut][image] kept
    std::vector<uint32_t>              per_layer;  // [layer] visual tokens held

    // [cut] indices kept over the prompt's images, in order; none if not pruned
    std::vector<std::vector<int32_t>> kept;

    // [cut] which of them stands for each visual token of the prompt, -1: none; none if nothing was merged
    std::vector<std::vector<int32_t>> owners;
};
