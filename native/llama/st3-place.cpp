#include "st3-place.h"

#include <algorithm>

std::vector<st3_placed> st3_by_place(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto & held = cells.seq_pos_get(seq_id);

    std::vector<st3_placed> res;
    for (auto it = held.lower_bound({ p0, 0 }); it != held.end() && it->first <= p1; ++it) {
        res.push_back({ st3_place::of(cells, it->second), it->second });
    }
    const auto before = [](const st3_placed & a, const st3_placed & b) { return a.place < b.place; };
    if (!std::is_sorted(res.begin(), res.end(), before)) {
        std::stable_sort(res.begin(), res.end(), before);
    }
    return res;
}

std::pair<uint32_t, uint32_t> st3_grid_of(const std::vector<st3_place> & places) {
    const auto next = [&](const st3_place & p) { return p.y != places[0].y; };
    const auto nx   = (uint32_t) (std::find_if(places.begin(), places.end(), next) - places.begin());
    if (places.empty() || places.size() % nx != 0) {
        return { 0, 0 };
    }
    for (uint32_t i = 0; i < places.size(); ++i) {
        const auto & first = places[0];
        if (!(places[i] == st3_place{ first.pos, first.y + (llama_pos) (i / nx), first.x + (llama_pos) (i % nx) })) {
            return { 0, 0 };
        }
    }
    return { nx, (uint32_t) places.size() / nx };
}
