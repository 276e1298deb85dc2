// st3-owners.h - which of an image's tokens stands for each of them, from cut to cut, and which are alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

class st3_owners {
  public:
    // ids: those of the image's n tokens that are there, ascending; each stands for itself.
    st3_owners(uint32_t n, std::vector<int32_t> ids);

    // A cut left `kept`, ascending. places: for each token that was there, its owner's place among them; empty where all or none
    // were kept.
    void cut(const std::vector<int32_t> & kept, const std::vector<int32_t> & places);

    // The token that stands for each [n], -1: none.
    const std::vector<int32_t> & of() const { return owners; }

    // How many each stands for [n].
    std::vector<float> weights() const;

  private:
    std::vector<int32_t> owners;
    std::vector<int32_t> ids;
};

// How alike tokens of an image are.
struct st3_likeness {
    std::vector<uint32_t> ids;      // ascending
    std::vector<float>    cosines;  // [ids][ids]

    // Whether tokens, ascending, are all of ids.
    bool knows(const std::vector<uint32_t> & tokens) const;

    // The one among `kept`, ascending and not empty, that is most like a token which is not. It and they must be among ids.
    uint32_t nearest(uint32_t id, const std::vector<uint32_t> & kept) const;
};

// Of tokens whose rows are F32 [ids][width], computed by the CPU on so many threads.
st3_likeness st3_compare(std::vector<uint32_t> ids, const std::vector<float> & rows, int n_threads);
