// st3-state.h - what a context remembers of its last st3_prefill.
#pragma once

#include "st3.h"

#include <string>
#include <vector>

struct st3_state {
    st3_mode              mode = ST3_MODE_OFF;
    std::string           reason;  // why not pruned although asked for
    llama_pos             p0     = 0;
    uint32_t              n_text = 0;  // prompt positions that are text
    std::vector<uint32_t> images;      // visual tokens of each image
};
