// st3-owners.h - which of an image's tokens stands for each of them, from cut to cut.
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
