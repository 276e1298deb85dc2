// st3-sequences.cpp - what seq_* and positions do to the stages, images and waiting rows of st3_memory.

#include "llama-impl.h"
#include "st3-memory.h"
#include "st3-wait.h"

#include <algorithm>
#include <limits>

static void normalize(llama_pos & p0, llama_pos & p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
}

void st3_memory::clear(bool data) {
    absorb();
    images.clear();
    waits.clear();
    accounts.clear();
    for (auto & s : stages) {
        s->clear(data);
    }
}

bool st3_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id < 0) {
        bool res = true;
        for (llama_seq_id id = 0; id < (llama_seq_id) n_seq_max; ++id) {
            res = seq_rm(id, p0, p1) && res;
        }
        return res;
    }
    normalize(p0, p1);
    if (!waits.can_rm(seq_id, p0, p1) && st3_decode_waiting(*lctx, seq_id) != 0) {
        return false;
    }
    absorb();

    const llama_pos end = seq_pos_max(seq_id) + 1;
    if (p0 < p1 && p1 >= end && p0 < end) {
        accounts[seq_id].open = false;  // what follows is another prompt
    }
    p0 = waits.rm(seq_id, p0, p1, end);
    images.rm(seq_id, p0, p1);
    if (p0 == 0 && p1 >= end) {
        accounts.erase(seq_id);
    }
    bool res = true;
    for (auto & s : stages) {
        res = s->seq_rm(seq_id, p0, p1) && res;
    }
    return res;
}

void st3_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    normalize(p0, p1);
    if (seq_id_src == seq_id_dst) {
        return;
    }
    const bool whole = p0 <= std::max(seq_pos_min(seq_id_src), 0) && p1 > seq_pos_max(seq_id_src);
    if (!unified && !whole) {
        LLAMA_LOG_ERROR(
                "%s: a part of a sequence cannot be copied where every sequence has its own cells (kv_unified)\n",
                __func__);
        return;
    }
    const bool empty = !unified || seq_pos_max(seq_id_dst) < 0;
    for (const auto id : { seq_id_src, seq_id_dst }) {
        // text alone is computed now: sequences share its cells, but each would compute what waits
        const auto * prompt = waits.of(id);
        const bool   text   = prompt && prompt->images.empty() && id == seq_id_src;
        if ((text || !(whole && empty)) && st3_decode_waiting(*lctx, id) != 0) {
            LLAMA_LOG_ERROR("%s: what waits in sequence %d could not be computed: nothing is copied\n", __func__, id);
            return;
        }
    }
    absorb();
    if (!unified) {
        images.rm(seq_id_dst, 0, std::numeric_limits<llama_pos>::max());
        synchronize();
    }
    if (whole && empty) {
        waits.cp(seq_id_src, seq_id_dst);
        if (accounts.count(seq_id_src)) {
            accounts[seq_id_dst] = accounts[seq_id_src];
        }
    } else {
        waits.asked.erase(seq_id_dst);
    }
    images.cp(seq_id_src, seq_id_dst, p0, p1);
    for (auto & s : stages) {
        s->seq_cp(seq_id_src, seq_id_dst, unified ? p0 : -1, unified ? p1 : -1);
        s->flush_copies();
    }
}

void st3_memory::seq_keep(llama_seq_id seq_id) {
    absorb();
    for (llama_seq_id id = 0; id < (llama_seq_id) n_seq_max; ++id) {
        if (unified && id != seq_id) {  // else the others have cells of their own, which llama.cpp lets be
            images.of(id).clear();
            waits.rm(id);
            accounts.erase(id);
        }
    }
    for (auto & s : stages) {
        s->seq_keep(seq_id);
    }
}

void st3_memory::seq_add(llama_seq_id, llama_pos, llama_pos, llama_pos shift) {
    if (shift != 0) {
        LLAMA_LOG_ERROR("%s: a pruned cache cannot be shifted (llama_memory_can_shift): positions stay\n", __func__);
    }
}

void st3_memory::seq_div(llama_seq_id, llama_pos, llama_pos, int d) {
    if (d > 1) {
        LLAMA_LOG_ERROR("%s: positions of a pruned cache cannot be divided: they stay\n", __func__);
    }
}

llama_pos st3_memory::seq_pos_min(llama_seq_id seq_id) const {
    llama_pos res = images.pos_min(seq_id);
    for (const auto & s : stages) {
        const llama_pos p = s->seq_pos_min(seq_id);
        res               = res < 0 || (p >= 0 && p < res) ? p : res;
    }
    const auto * prompt = waits.of(seq_id);
    return prompt && (res < 0 || prompt->p0() < res) ? prompt->p0() : res;
}

llama_pos st3_memory::seq_pos_max(llama_seq_id seq_id) const {
    llama_pos res = images.pos_max(seq_id);
    for (const auto & s : stages) {
        res = std::max(res, s->seq_pos_max(seq_id));
    }
    const auto * prompt = waits.of(seq_id);
    return prompt ? std::max(res, prompt->end() - 1) : res;
}
