// st3-likeness.h - which tokens of an image are alike: who inherits the weight of one that leaves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// Cosines of rows F32 [n_a][width] with rows F32 [n_b][width], computed by the CPU on so many threads, which the caller waits for:
// F32 [n_a][n_b]. Throws std::bad_alloc.
std::vector<float>
st3_cosines(const std::vector<float> & a, size_t n_a, const std::vector<float> & b, size_t n_b, int n_threads);

// For each of an image's tokens those that are most like it.
class st3_likeness {
  public:
    static constexpr uint32_t NONE = UINT32_MAX;

    // ids: ascending; cosines [ids][ids]
    st3_likeness(std::vector<uint32_t> ids, const std::vector<float> & cosines);

    // The one among `kept`, ascending, that is most like a token which is not; of equals the lower one. NONE: all that are much
    // like it have left, or it is not one of ids.
    uint32_t nearest(uint32_t id, const std::vector<uint32_t> & kept) const;

  private:
    std::vector<uint32_t> ids;
    size_t                n_near;
    std::vector<uint32_t> near;  // [ids][n_near] the most alike first
};
