// st3-plan.h - what a pruned prompt does to the rows of its stages: spans, counts, shortened ubatches. No state.
#pragma once

#include "llama-batch.h"
#include "st3-prompt.h"
#include "st3-schedule.h"

#include <memory>
#include <vector>

struct ggml_tensor;

// What a pruned prefill does, known in full before the compute but for which tokens survive.
struct st3_plan {
    std::vector<st3_span>              spans;
    std::vector<std::vector<uint32_t>> counts;      // [stage][image] visual tokens held
    std::vector<llama_ubatch>          ubatches;    // [stage] the rows that the stage computes
    uint32_t                           n_text = 0;  // rows after the last image
    uint32_t                           number = 0;  // of the first image in its sequence

    // Set by the graph, read after compute: [cut][image] original indices kept, I32 [counts[cut + 1][image]]; null: all.
    std::vector<std::vector<ggml_tensor *>> kept;

    // The same of what was merged: [cut][image] the place among those kept of each token's owner, I32
    // [counts[cut][image]]; null: all kept, or none.
    std::vector<std::vector<ggml_tensor *>> owners;

    uint32_t n_stage() const { return (uint32_t) ubatches.size(); }

    uint32_t n_rows(uint32_t stage) const { return ubatches[stage].n_tokens; }

    // First row of an image in a stage.
    uint32_t row(uint32_t stage, size_t image) const;

    // Visual tokens of all images in a stage.
    uint32_t n_visual(uint32_t stage) const;

    // Row in the last stage of a text row of the batch.
    uint32_t last_row(uint32_t row) const;
};

// A ubatch of one sequence, all of whose images are new. number: of the first of them in the sequence.
std::unique_ptr<st3_plan>
st3_make_plan(const st3_schedule & schedule, std::vector<st3_span> spans, uint32_t number, const llama_ubatch & ubatch);
