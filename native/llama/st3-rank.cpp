#include "st3-rank.h"

#include <algorithm>

std::vector<uint32_t> st3_highest(std::vector<uint32_t> ids, const std::vector<float> & rank, size_t n) {
    if (n < ids.size()) {
        std::sort(ids.begin(), ids.end(), [&](uint32_t a, uint32_t b) {
            return rank[a] != rank[b] ? rank[a] > rank[b] : a < b;
        });
        ids.resize(n);
        std::sort(ids.begin(), ids.end());
    }
    return ids;
}
