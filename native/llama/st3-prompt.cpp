#include "st3-prompt.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>
#include <tuple>

std::pair<uint32_t, uint32_t> st3_announced::grid(const std::vector<st3_place> & came) const {
    const auto n_came = (uint32_t) came.size();
    if (nx > 0 && uint64_t(nx) * ny == n_came) {
        return { nx, ny };
    }
    if (const auto grid = st3_grid_of(came); grid.first > 0) {
        return grid;
    }
    const uint32_t side = (uint32_t) std::lround(std::sqrt((double) n_came));
    return side * side == n_came && nx == 0 ? std::pair(side, side) : std::pair(n_came, 1u);
}

void st3_announced::join(uint32_t n_before, uint32_t nx_before, uint32_t ny_before) {
    std::tie(nx, ny) = grid(std::vector<st3_place>(n));
    ny               = nx == nx_before ? ny + ny_before : 1;
    n += n_before;
    nx = n / ny;
}

//
// st3_prompt
//

uint32_t st3_prompt::n_before(llama_pos p) const {
    const auto it = std::find_if(pos.begin(), pos.end(), [p](const st3_pos & at) { return at[0] >= p; });
    return (uint32_t) (it - pos.begin());
}

// Memory for n more.
template <typename T> static void make_room(std::vector<T> & list, size_t n) {
    if (list.capacity() - list.size() < n) {
        list.reserve(std::max(list.size() + n, 2 * list.size()));
    }
}

void st3_prompt::add_tokens(const std::vector<llama_token> & ids, const std::vector<st3_pos> & at) {
    make_room(tokens, ids.size());
    make_room(pos, at.size());
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    pos.insert(pos.end(), at.begin(), at.end());
}

void st3_prompt::add_image(
        const st3_announced & image, const float * rows, const std::vector<st3_pos> & at, uint32_t n_embd,
        bool causal) {
    st3_span span = image.begins() ? st3_span{ n_rows(), 0, 0, 0, causal } : images.back();
    span.n += (uint32_t) at.size();

    std::vector<st3_place> places;
    const auto             place = [](const st3_pos & p) { return st3_place::of(p); };
    std::transform(pos.begin() + span.row, pos.end(), std::back_inserter(places), place);
    std::transform(at.begin(), at.end(), std::back_inserter(places), place);
    std::tie(span.nx, span.ny) = image.grid(places);

    make_room(images, 1);
    make_room(embd, at.size() * n_embd);
    add_tokens(std::vector<llama_token>(at.size(), LLAMA_TOKEN_NULL), at);  // from here on nothing throws
    embd.insert(embd.end(), rows, rows + at.size() * n_embd);
    if (image.begins()) {
        images.push_back(span);
        keep = keep && image.keep;
    } else {
        images.back() = span;
    }
}

st3_prompt st3_prompt::part(uint32_t begin, uint32_t end) const {
    const auto   n_before = std::count(tokens.begin(), tokens.begin() + begin, LLAMA_TOKEN_NULL);
    const auto   n_image  = std::count(tokens.begin() + begin, tokens.begin() + end, LLAMA_TOKEN_NULL);
    const size_t n_embd   = embd.empty() ? 0 : embd.size() / std::count(tokens.begin(), tokens.end(), LLAMA_TOKEN_NULL);

    st3_prompt res;
    res.keep = keep;
    res.pos.assign(pos.begin() + begin, pos.begin() + end);
    res.tokens.assign(tokens.begin() + begin, tokens.begin() + end);
    res.embd.assign(embd.begin() + n_before * n_embd, embd.begin() + (n_before + n_image) * n_embd);
    for (const auto & span : images) {
        const uint32_t first = std::max(span.row, begin);
        const uint32_t last  = std::min(span.row + span.n, end);
        if (first < last) {
            const bool whole = last - first == span.n;
            res.images.push_back(
                    { first - begin, last - first, whole ? span.nx : last - first, whole ? span.ny : 1u, span.causal });
        }
    }
    return res;
}

//
// st3_waits
//

bool st3_waits::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto * prompt = of(seq_id);
    return !prompt || p1 >= prompt->end() || p1 < prompt->p0() || p0 >= p1;
}

llama_pos st3_waits::rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos seq_end) {
    auto & list = asked[seq_id];
    if (p0 >= p1) {
        return p0;
    }
    if (p0 < seq_end) {
        pictures.erase(seq_id);  // what comes next does not go on where its tokens ended
    }
    if (p1 < seq_end) {  // in the middle: what comes after it can never be read again, as positions must have no gap
        while (!list.empty() && list.back()->end() > p0) {
            list.pop_back();
        }
        return p0;
    }
    if (const auto * prompt = of(seq_id); prompt && p0 < prompt->end()) {
        auto rest = prompt->part(0, prompt->n_before(p0));
        waiting.erase(seq_id);
        if (rest.n_rows() > 0) {
            waiting[seq_id] = std::move(rest);
        }
    }
    while (!list.empty() && list.back()->p0() >= p0) {
        list.pop_back();
    }
    if (!list.empty() && list.back()->end() > p0) {
        auto rest = list.back()->part(0, list.back()->n_before(p0));
        list.pop_back();
        if (!rest.images.empty()) {
            p0              = rest.p0();
            waiting[seq_id] = std::move(rest);
        }
    }
    return p0;
}

void st3_waits::cp(llama_seq_id src, llama_seq_id dst) {
    rm(dst);
    if (const auto * prompt = of(src)) {
        waiting[dst] = *prompt;
    }
    asked[dst] = asked[src];
    if (const auto it = pictures.find(src); it != pictures.end()) {
        pictures[dst] = it->second;
    }
}

size_t st3_waits::n_bytes() const {
    size_t res = 0;
    for (const auto & [id, prompt] : waiting) {
        res += prompt.embd.size();
    }
    std::set<const st3_prompt *> seen;  // sequences may share them
    for (const auto & [id, list] : asked) {
        for (const auto & prompt : list) {
            res += seen.insert(prompt.get()).second ? prompt->embd.size() : 0;
        }
    }
    return res * sizeof(float);
}
