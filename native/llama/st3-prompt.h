// st3-prompt.h - rows of prompts that wait to be computed, or may have to be computed again: data, no tensors.
#pragma once

#include "st3-place.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// One image in a prompt: rows [row, row + n).
struct st3_span {
    uint32_t row;
    uint32_t n;
    uint32_t nx;
    uint32_t ny;
    uint32_t causal;  // 0: its tokens see those after them, too
};

// What the next embeddings are, as st3_announce_image() says: `left` of the n tokens of an image are still to come, which
// besides theirs may have those that came before of the same picture.
struct st3_announced {
    uint32_t n    = 0;
    uint32_t nx   = 0;  // 0: unknown
    uint32_t ny   = 0;
    uint32_t left = 0;
    bool     keep = true;  // st3_prompt::keep

    std::string picture = "";  // whose tokens they are; empty: a picture of their own

    // The tokens that came before, of a patch grid, are of the same image: their rows lie on top.
    void join(uint32_t n_before, uint32_t nx_before, uint32_t ny_before);

    bool begins() const { return left == n; }

    // The patch grid of the tokens that came of the image, at these places.
    std::pair<uint32_t, uint32_t> grid(const std::vector<st3_place> & came) const;
};

// Rows of one sequence, as they were given to llama_decode.
struct st3_prompt {
    std::vector<st3_pos>     pos;          // [row] ascending; with M-RoPE the tokens of an image share [0]
    std::vector<llama_token> tokens;       // [row] LLAMA_TOKEN_NULL: an embedding
    std::vector<float>       embd;         // [embeddings][n_embd_inp]
    std::vector<st3_span>    images;       // in order
    bool                     keep = true;  // so that it can be read again when a part of its question is taken back

    uint32_t  n_rows() const { return (uint32_t) tokens.size(); }
    llama_pos p0() const { return pos.front()[0]; }
    llama_pos end() const { return pos.back()[0] + 1; }

    // Rows before position p.
    uint32_t n_before(llama_pos p) const;

    // Rows before the first image; all if there is none.
    uint32_t n_lead() const { return images.empty() ? n_rows() : images[0].row; }

    bool ends_in_image() const { return !images.empty() && images.back().row + images.back().n == n_rows(); }

    // Where they throw std::bad_alloc, nothing was added.
    void add_tokens(const std::vector<llama_token> & ids, const std::vector<st3_pos> & at);
    // Tokens of an image, embd F32 [at.size()][n_embd].
    void add_image(
            const st3_announced & image, const float * embd, const std::vector<st3_pos> & at, uint32_t n_embd,
            bool causal);

    // Rows [begin, end).
    st3_prompt part(uint32_t begin, uint32_t end) const;
};

// By sequence.
struct st3_waits {
    std::map<llama_seq_id, st3_prompt> waiting;  // not computed yet

    // computed and pruned, in order: what to read again when a part of a question is taken back
    std::map<llama_seq_id, std::vector<std::shared_ptr<const st3_prompt>>> asked;

    st3_announced                       announced;
    std::map<llama_seq_id, std::string> pictures;  // whose tokens came last, and are there

    // Whether the announced tokens are of the picture that came last.
    bool same_picture(llama_seq_id seq_id) const {
        const auto it = pictures.find(seq_id);
        return it != pictures.end() && !it->second.empty() && it->second == announced.picture;
    }

    const st3_prompt * of(llama_seq_id seq_id) const {
        const auto it = waiting.find(seq_id);
        return it == waiting.end() ? nullptr : &it->second;
    }

    // Whether positions [p0, p1) of a sequence can go while others wait: what is left must be the beginning of it.
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // Takes the positions out. Returns from where on the sequence must be emptied: p0, or the beginning of a prompt that
    // lost a part of its question, which then waits again.
    llama_pos rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos seq_end);

    void cp(llama_seq_id src, llama_seq_id dst);
    void rm(llama_seq_id seq_id) {
        waiting.erase(seq_id);
        asked.erase(seq_id);
        pictures.erase(seq_id);
    }
    void clear() {
        waiting.clear();
        asked.clear();
        pictures.clear();
        announced = {};
    }

    // Bytes of embeddings.
    size_t n_bytes() const;
};
