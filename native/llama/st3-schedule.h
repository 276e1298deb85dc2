// st3-schedule.h - how many visual tokens every layer keeps, and by which rank: pure arithmetic, no tensors.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <unordered_map>
#include <vector>

// One term of a score: how the attention that a visual token receives is reduced to a number in [0, 1].
struct st3_score_term {
    bool text;  // queries: all prompt text after the last image, else the last prompt token
    bool max;   // over heads and queries: the maximum, else the mean
    bool sum;   // averaged over the layers (at a cut: all so far; annealing: the stage's), else the last of them alone

    bool operator==(const st3_score_term & o) const { return text == o.text && max == o.max && sum == o.sum; }
};

// How the share of visual tokens that stay falls from 1 to anneal_floor over anneal_tokens generated tokens.
enum st3_curve {
    ST3_CURVE_NONE,
    ST3_CURVE_LINEAR,
    ST3_CURVE_COSINE,
    ST3_CURVE_EXPONENTIAL,
};

// Rank of a visual token, at a cut and in annealing: score + bias, the highest survive. At a cut the score is that of each
// token that it stands for.
struct st3_schedule {
    std::string preset = "off";

    uint32_t n_layer   = 0;
    uint32_t start     = 0;
    uint32_t stride    = 0;
    double   keep      = 1.0;
    uint32_t min_keep  = 0;
    double   min_share = 0.0;
    double   coverage  = 0.0;
    uint32_t seed      = 0;
    bool     random    = false;  // no score, and a random bias
    bool     merge     = false;  // a kept token stands for those dropped that are most like it
    bool     distance  = false;  // scores count by the distance to the most similar token of a higher score

    std::string                 score;  // as written
    std::vector<st3_score_term> terms;  // as parsed; empty where there is no score

    std::vector<int32_t> cuts;  // layers after which visual tokens leave, ascending

    st3_curve anneal          = ST3_CURVE_NONE;
    uint32_t  anneal_tokens   = 1;
    double    anneal_floor    = 1.0;
    uint32_t  anneal_interval = 1;
    bool      anneal_random   = false;  // no score, and a random bias

    std::string                 anneal_score;
    std::vector<st3_score_term> anneal_terms;  // empty where there is no score

    bool anneals() const { return anneal != ST3_CURVE_NONE && anneal_floor < 1.0; }

    bool vision_fast = false;  // the vision encoder may compute in another type than its file's

    bool off() const { return cuts.empty() && !anneals(); }

    const char * curve_name() const;
    const char * rank_name() const;

    uint32_t n_stage() const { return (uint32_t) cuts.size() + 1; }

    // Number of cuts before layer il, which is the stage that the layer belongs to.
    uint32_t stage(int32_t il) const;

    // Mean over layers of the share of an image's tokens that is left, before rounding to whole ones.
    double budget() const;

    // Last layer of a stage.
    int32_t last_layer(uint32_t stage) const;

    // Tokens that an image of n leaves in each stage: [n, after cut 0, after cut 1, ...].
    std::vector<uint32_t> counts(uint32_t n) const;

    // Tokens that an image of n keeps in any case, if it has them.
    uint32_t least(uint32_t n) const;

    // Tokens left of the n0 that a stage held of an image of n, after step generated tokens.
    uint32_t target(uint32_t n, uint32_t n0, uint64_t step) const;
    // And when no more will leave.
    uint32_t last_target(uint32_t n, uint32_t n0) const { return target(n, n0, std::numeric_limits<uint64_t>::max()); }

    // Bias of each of an image's nx * ny tokens where n_keep of them are to stay.
    // i_image tells the images of a sequence apart for the random bias. Returns [nx * ny].
    std::vector<float> bias(uint32_t nx, uint32_t ny, uint32_t n_keep, uint32_t i_image, bool by_chance) const;
};

// Reads the st3.* keys of a model's metadata (values as strings). Throws std::invalid_argument with a line for the user.
st3_schedule st3_make_schedule(const std::unordered_map<std::string, std::string> & meta, uint32_t n_layer);

// The nested, evenly spread order of an nx * ny grid: the patch nearest the centre, then always the patch farthest from
// all before it (squared Euclidean distance; ties to the lower index). Computed once a grid size. Returns [nx * ny].
const std::vector<uint32_t> & st3_spread_order(uint32_t nx, uint32_t ny);
