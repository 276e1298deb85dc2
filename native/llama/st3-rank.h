// st3-rank.h - the one ranking rule on the host; the cut in the graph is its twin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// Of ids, ascending, those of the n highest ranks, ascending: of equal ranks the lower id stays. rank: by id.
std::vector<uint32_t> st3_highest(std::vector<uint32_t> ids, const std::vector<float> & rank, size_t n);
