// st3-account.h - what became of a prompt, for the report.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

// For each cut, indices over all images of a prompt in order.
using st3_kept_t = std::vector<std::vector<int32_t>>;

// What became of a sequence's last prompt: all rows since an output was asked for, up to the next one; generated tokens are none.
struct st3_account {
    bool     open   = false;  // goes on with the next rows
    uint32_t n_rows = 0;      // positions of the prompt

    std::vector<uint64_t> rows;            // [stage] rows computed
    std::vector<double>   pairs;           // [stage] (query, key) pairs of a causal mask
    double                pairs_full = 0;  // had nothing ever been dropped

    st3_kept_t kept;    // none if not pruned in the compute
    st3_kept_t owners;  // [cut] which token stands for each of all; -1: none

    std::map<uint32_t, int32_t> first;  // by an image's number, the index of its first token in these

    std::string reason;  // why its last image was not; stays for later prompts without one
};
