#include "st3-images.h"

#include <algorithm>
#include <set>

const std::vector<st3_image> & st3_images::of(llama_seq_id seq_id) const {
    static const std::vector<st3_image> none;

    const auto it = seqs.find(seq_id);
    return it == seqs.end() ? none : it->second;
}

uint32_t st3_image::n_there() const {
    const auto there = [](const st3_place & p) { return p.pos >= 0; };
    return (uint32_t) std::count_if(places.begin(), places.end(), there);
}

// Calls fn for the place of each token that is still there, which it may change; images without tokens go.
template <typename F> static void each_place(std::vector<st3_image> & images, F && fn) {
    for (auto & image : images) {
        for (auto & p : image.places) {
            if (p.pos >= 0) {
                fn(p);
            }
        }
    }
    const auto empty = [](const st3_image & image) {
        return std::all_of(image.places.begin(), image.places.end(), [](const st3_place & p) { return p.pos < 0; });
    };
    images.erase(std::remove_if(images.begin(), images.end(), empty), images.end());
}

st3_image & st3_images::add(llama_seq_id seq_id, const std::vector<st3_place> & places, bool more) {
    auto & images = seqs[seq_id];
    if (!more) {
        st3_image image;
        image.number = images.empty() ? 0 : images.back().number + 1;
        images.push_back(std::move(image));
    }
    auto & image = images.back();
    image.places.insert(image.places.end(), places.begin(), places.end());
    return image;
}

void st3_images::rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    each_place(seqs[seq_id], [=](st3_place & p) { p.pos = p.pos >= p0 && p.pos < p1 ? -1 : p.pos; });
}

void st3_images::cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    auto & images = seqs[dst];

    std::set<st3_place> there;  // copied before
    for (const auto & image : images) {
        there.insert(image.places.begin(), image.places.end());
    }
    auto copy = of(src);
    each_place(copy, [&](st3_place & p) { p.pos = p.pos >= p0 && p.pos < p1 && there.count(p) == 0 ? p.pos : -1; });
    for (auto & image : images) {
        image.alike.clear();  // tokens that had left may be there again
    }
    images.insert(images.end(), copy.begin(), copy.end());
}

llama_pos st3_images::pos_min(llama_seq_id seq_id) const {
    llama_pos res = -1;
    for (const auto & image : of(seq_id)) {
        for (const auto & p : image.places) {
            res = p.pos >= 0 && (res < 0 || p.pos < res) ? p.pos : res;
        }
    }
    return res;
}

llama_pos st3_images::pos_max(llama_seq_id seq_id) const {
    llama_pos res = -1;
    for (const auto & image : of(seq_id)) {
        for (const auto & p : image.places) {
            res = std::max(res, p.pos);
        }
    }
    return res;
}
