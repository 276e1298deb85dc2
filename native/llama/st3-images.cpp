#include "st3-images.h"

#include <algorithm>
#include <set>

const std::vector<st3_image> & st3_images::of(llama_seq_id seq_id) const {
    static const std::vector<st3_image> none;

    const auto it = seqs.find(seq_id);
    return it == seqs.end() ? none : it->second;
}

// Calls fn for the position of each token that is still there, which it may change; images without tokens go.
template <typename F> static void each_pos(std::vector<st3_image> & images, F && fn) {
    for (auto & image : images) {
        for (auto & p : image.pos) {
            if (p >= 0) {
                fn(image, p);
            }
        }
    }
    const auto empty = [](const st3_image & image) {
        return std::all_of(image.pos.begin(), image.pos.end(), [](llama_pos p) { return p < 0; });
    };
    images.erase(std::remove_if(images.begin(), images.end(), empty), images.end());
}

st3_image & st3_images::add(llama_seq_id seq_id, llama_pos p0, uint32_t n, bool more) {
    auto & images = seqs[seq_id];
    if (!more) {
        st3_image image;
        image.number = images.empty() ? 0 : images.back().number + 1;
        images.push_back(std::move(image));
    }
    auto & image = images.back();
    for (uint32_t i = 0; i < n; ++i) {
        image.pos.push_back(p0 + (llama_pos) i);
    }
    return image;
}

void st3_images::rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    each_pos(seqs[seq_id], [=](st3_image &, llama_pos & p) { p = p >= p0 && p < p1 ? -1 : p; });
}

void st3_images::cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    auto & images = seqs[dst];

    std::set<llama_pos> there;  // copied before
    for (const auto & image : images) {
        there.insert(image.pos.begin(), image.pos.end());
    }
    auto copy = of(src);
    each_pos(copy, [&](st3_image &, llama_pos & p) { p = p >= p0 && p < p1 && there.count(p) == 0 ? p : -1; });
    images.insert(images.end(), copy.begin(), copy.end());
}

llama_pos st3_images::pos_min(llama_seq_id seq_id) const {
    llama_pos res = -1;
    for (const auto & image : of(seq_id)) {
        for (const llama_pos p : image.pos) {
            res = p >= 0 && (res < 0 || p < res) ? p : res;
        }
    }
    return res;
}

llama_pos st3_images::pos_max(llama_seq_id seq_id) const {
    llama_pos res = -1;
    for (const auto & image : of(seq_id)) {
        for (const llama_pos p : image.pos) {
            res = std::max(res, p);
        }
    }
    return res;
}
