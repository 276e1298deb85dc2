// st3-images.h - the images that sequences hold, by the places of their tokens: bookkeeping, no tensors.
#pragma once

#include "st3-place.h"

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

class st3_likeness;

// One image of a sequence. Which stage still holds which of its tokens is for the stages' cells to say.
struct st3_image {
    uint32_t nx     = 0;  // patch grid
    uint32_t ny     = 0;
    uint32_t number = 0;  // tells the images of a sequence apart

    std::vector<st3_place> places;  // [n] of each token

    bool pruned  = false;  // has been through its cuts; until then it waits for its question
    bool evicted = false;  // was cut down after the compute, not in it

    uint64_t n_steps   = 0;  // tokens generated since
    uint64_t n_records = 0;  // records in its scores

    std::vector<uint32_t>           n0;  // [stage] tokens held after prefill
    // [stage][n] tokens that each stands for; empty: itself alone. 0: it left, and if a copy gave it back it stands for itself
    // beside its heir
    std::vector<std::vector<float>> weights;
    std::vector<std::vector<float>> scores;  // [stage][n] sum of records

    // [stage] null: not compared yet, or no more will leave
    std::vector<std::shared_ptr<const st3_likeness>> alike;

    // Tokens that were not taken out of the sequence.
    uint32_t n_there() const;
};

class st3_images {
  public:
    std::vector<st3_image> &       of(llama_seq_id seq_id) { return seqs[seq_id]; }
    const std::vector<st3_image> & of(llama_seq_id seq_id) const;

    // Adds tokens: to the sequence's last image where `more` says so, else as a new one.
    st3_image & add(llama_seq_id seq_id, const std::vector<st3_place> & places, bool more);

    // As the functions of llama_memory_i: positions in [p0, p1).
    void rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
    void clear() { seqs.clear(); }

    // Over all images of a sequence; -1 if there is none.
    llama_pos pos_min(llama_seq_id seq_id) const;
    llama_pos pos_max(llama_seq_id seq_id) const;

  private:
    std::map<llama_seq_id, std::vector<st3_image>> seqs;
};
