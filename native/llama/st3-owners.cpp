#include "st3-owners.h"

#include <cmath>
#include <numeric>

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

static float dot(const float * a, const float * b, size_t n) {
    constexpr size_t LANES = 16;  // sums side by side, as vector units add

    float  sums[LANES] = {};
    size_t i           = 0;
    for (; i + LANES <= n; i += LANES) {
        for (size_t j = 0; j < LANES; ++j) {
            sums[j] += a[i + j] * b[i + j];
        }
    }
    float res = std::accumulate(sums, sums + LANES, 0.0f);
    for (; i < n; ++i) {
        res += a[i] * b[i];
    }
    return res;
}

std::vector<int32_t> st3_nearest(std::vector<float> rows, size_t width, const std::vector<uint32_t> & kept) {
    for (const uint32_t k : kept) {  // their lengths count
        float *     row  = rows.data() + k * width;
        const float size = std::sqrt(dot(row, row, width));
        for (size_t i = 0; i < width && size > 0.0f; ++i) {
            row[i] /= size;
        }
    }
    std::vector<int32_t> res(rows.size() / width);
    for (size_t j = 0, own = 0; j < res.size(); ++j) {
        if (own < kept.size() && kept[own] == j) {
            res[j] = (int32_t) own++;
            continue;
        }
        float best = -INFINITY;
        for (size_t k = 0; k < kept.size(); ++k) {
            const float s = dot(rows.data() + j * width, rows.data() + kept[k] * width, width);
            if (s > best) {
                best   = s;
                res[j] = (int32_t) k;
            }
        }
    }
    return res;
}
