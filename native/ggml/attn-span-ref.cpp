#include "attn-span-ref.h"

#include <algorithm>
#include <cmath>
#include <vector>

void attn_span_ref(
        const float * q, const float * k, const float * mask, const int32_t * ids, double * out, int64_t d, int64_t n_q,
        int64_t n_head, int64_t n_kv, int64_t n_head_kv, int64_t n_span, double scale, bool is_max) {
    std::vector<double> p(n_kv);

    std::fill(out, out + n_span, 0.0);

    for (int64_t h = 0; h < n_head; ++h) {
        const float * k_head = k + (h / (n_head / n_head_kv)) * n_kv * d;

        for (int64_t r = 0; r < n_q; ++r) {
            double max = -INFINITY;
            for (int64_t c = 0; c < n_kv; ++c) {
                double dot = 0.0;
                for (int64_t i = 0; i < d; ++i) {
                    dot += (double) q[(h * n_q + r) * d + i] * k_head[c * d + i];
                }
                p[c] = scale * dot + mask[r * n_kv + c];
                max  = std::max(max, p[c]);
            }
            if (max == -INFINITY) {
                continue;
            }

            double sum = 0.0;
            for (int64_t c = 0; c < n_kv; ++c) {
                p[c] = std::exp(p[c] - max);
                sum += p[c];
            }
            for (int64_t i = 0; i < n_span; ++i) {
                const double prob = p[ids[i]] / sum;
                out[i]            = is_max ? std::max(out[i], prob) : out[i] + prob / (double) (n_head * n_q);
            }
        }
    }
}
