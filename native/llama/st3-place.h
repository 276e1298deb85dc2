// st3-place.h - where a token of a sequence is: its position, and with M-RoPE its row and column too, which all tokens of one
// picture differ by while they share the position.
#pragma once

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include <array>
#include <tuple>
#include <utility>
#include <vector>

// The positions of a row of a batch, as llama_batch_ext has them: [0] the sequence's, with M-RoPE [1] y, [2] x, [3] another.
using st3_pos = std::array<llama_pos, GGML_MROPE_SECTIONS>;

// Larger ones cannot have come from a decode; and arithmetic on positions, ours and llama.cpp's, must not overflow.
inline constexpr llama_pos ST3_MAX_POS = 1 << 30;

struct st3_place {
    llama_pos pos = -1;  // -1: taken out of the sequence
    llama_pos y   = 0;   // 0 without M-RoPE, as in the cells
    llama_pos x   = 0;

    bool operator==(const st3_place & o) const { return pos == o.pos && y == o.y && x == o.x; }
    bool operator<(const st3_place & o) const { return std::tie(pos, y, x) < std::tie(o.pos, o.y, o.x); }

    static st3_place of(const st3_pos & p) { return { p[0], p[1], p[2] }; }

    static st3_place of(const llama_ubatch & ubatch, uint32_t row) {
        const auto at = [&](uint32_t i) { return ubatch.is_pos_2d() ? ubatch.pos[row + i * ubatch.n_tokens] : 0; };
        return { ubatch.pos[row], at(1), at(2) };
    }

    static st3_place of(const llama_kv_cells & cells, uint32_t cell) {
        return { cells.pos_get(cell), cells.ext_get(cell).y, cells.ext_get(cell).x };
    }
};

// The positions of a text token.
inline st3_pos st3_text_pos(llama_pos p, uint32_t n_pos_per_embd) {
    return n_pos_per_embd > 1 ? st3_pos{ p, p, p, 0 } : st3_pos{ p, 0, 0, 0 };
}

struct st3_placed {
    st3_place place;
    uint32_t  cell;
};

// The cells of a sequence at positions [p0, p1], by place.
std::vector<st3_placed> st3_by_place(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

// The patch grid nx * ny that places are, row by row; 0, 0 if they are none.
std::pair<uint32_t, uint32_t> st3_grid_of(const std::vector<st3_place> & places);
