#include "st3-owners.h"

#include <utility>

st3_owners::st3_owners(uint32_t n, std::vector<int32_t> ids_) : owners(n, -1), ids(std::move(ids_)) {
    for (const int32_t id : ids) {
        owners[id] = id;
    }
}

void st3_owners::cut(const std::vector<int32_t> & kept, const std::vector<int32_t> & places) {
    if (!places.empty()) {
        std::vector<int32_t> next(owners.size(), -1);
        for (size_t j = 0; j < ids.size(); ++j) {
            next[ids[j]] = kept.at((size_t) places[j]);
        }
        for (auto & o : owners) {
            o = o < 0 ? o : next[o];
        }
    } else if (kept.empty()) {
        owners.assign(owners.size(), -1);
    }
    ids = kept;
}

std::vector<float> st3_owners::weights() const {
    std::vector<float> res(owners.size());
    for (const int32_t o : owners) {
        if (o >= 0) {
            res[o] += 1.0f;
        }
    }
    return res;
}
