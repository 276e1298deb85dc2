// st3-saved.cpp - what a saved state is made of.

#include "st3-saved.h"

#include "llama-hparams.h"
#include "llama-model.h"
#include "st3-memory.h"

#include <algorithm>
#include <cmath>

void st3_put_shape(st3_writer & w, const st3_memory & mem) {
    w.put(mem.schedule.n_layer);
    w.put(mem.n_stage());
    w.put((uint32_t) mem.stage(0).type_k());
    w.put((uint32_t) mem.stage(0).type_v());
    w.put(mem.schedule.cuts);
    for (uint32_t s = 0; s < mem.n_stage(); ++s) {
        for (size_t i = 0; i < mem.stage(s).n_layers(); ++i) {
            w.put((uint32_t) mem.stage(s).k_of(i, 0)->ne[0]);
            w.put((uint32_t) mem.stage(s).v_of(i, 0)->ne[0]);
        }
    }
    const auto & s = mem.schedule;
    st3_checksum rest;
    for (const double x : { s.keep, s.min_share, s.coverage, s.anneal_floor }) {
        rest.add(&x, sizeof(x));
    }
    for (const uint32_t x : { s.min_keep, s.seed, (uint32_t) s.anneal, s.anneal_tokens, s.anneal_interval,
                              (uint32_t) (s.random | s.merge << 1 | s.distance << 2 | s.anneal_random << 3) }) {
        rest.add(&x, sizeof(x));
    }
    const auto scores = s.score + ' ' + s.anneal_score;
    rest.add(scores.data(), scores.size());
    w.put(rest.value());
}

void st3_put(st3_writer & w, const st3_image & image) {
    w.put((uint32_t) image.places.size());
    w.put(image.nx);
    w.put(image.ny);
    w.put(image.number);
    w.put((uint32_t) (image.pruned | image.evicted << 1));
    w.put(image.n_steps);
    w.put(image.n_records);
    w.put(image.places);
    w.put((uint32_t) image.n0.size());
    w.put(image.n0);
    w.put((uint32_t) image.scores.size());
    for (const auto & scores : image.scores) {
        w.put(scores);
    }
    w.put((uint32_t) image.weights.size());
    for (const auto & weights : image.weights) {
        w.put(weights);
    }
}

static bool possible(const st3_place & p) {
    return p.pos >= -1 && p.pos <= ST3_MAX_POS && p.y >= 0 && p.y <= ST3_MAX_POS && p.x >= 0 && p.x <= ST3_MAX_POS;
}

st3_image st3_get_image(st3_reader & r, const st3_memory & mem) {
    const uint32_t n_stage = mem.n_stage();

    st3_image  image;
    const auto n = r.get<uint32_t>();
    image.nx     = r.get<uint32_t>();
    image.ny     = r.get<uint32_t>();
    image.number = r.get<uint32_t>();

    const auto flags = r.get<uint32_t>();
    image.pruned     = flags & 1;
    image.evicted    = flags & 2;
    image.n_steps    = r.get<uint64_t>();
    image.n_records  = r.get<uint64_t>();
    image.places     = r.get<st3_place>(n);

    const auto n_counts = r.get<uint32_t>();
    image.n0            = r.get<uint32_t>(n_counts);
    const auto n_scores = r.get<uint32_t>();

    if (n == 0 || n > mem.stage(0).n_max || uint64_t(image.nx) * image.ny != n || flags > 3 ||
        n_counts != (image.pruned ? n_stage : 0) ||
        (n_scores != 0 && (!image.pruned || n_scores != n_stage || image.n_records == 0)) ||
        std::any_of(image.places.begin(), image.places.end(), [](const st3_place & p) { return !possible(p); }) ||
        std::any_of(image.n0.begin(), image.n0.end(), [n](uint32_t c) { return c > n; })) {
        st3_fail("the saved state holds an impossible image");
    }
    // [stage][n] of which none may be what `ok` is not
    const auto get_each = [&](uint32_t n_rows, auto && ok) {
        std::vector<std::vector<float>> rows;
        for (uint32_t s = 0; s < n_rows; ++s) {
            rows.push_back(r.get<float>(n));
            if (!std::all_of(rows[s].begin(), rows[s].end(), ok)) {
                st3_fail("the saved state holds an impossible image");
            }
        }
        return rows;
    };
    image.scores = get_each(n_scores, [](float x) { return std::isfinite(x); });

    const auto n_weights = r.get<uint32_t>();
    if (n_weights != (image.pruned && mem.schedule.merge ? n_stage : 0)) {
        st3_fail("the saved state holds an impossible image");
    }
    image.weights = get_each(n_weights, [n](float x) { return x >= 0.0f && x <= (float) n; });
    return image;
}

void st3_put(st3_writer & w, const st3_prompt & prompt) {
    w.put(prompt.n_rows());
    w.put(prompt.pos);
    w.put(prompt.tokens);
    w.put((uint64_t) prompt.embd.size());
    w.put(prompt.embd);
    w.put((uint32_t) prompt.images.size());
    w.put(prompt.images);
}

st3_prompt st3_get_prompt(st3_reader & r, const llama_model & model) {
    const auto count = r.get<uint32_t>();

    st3_prompt prompt;
    prompt.pos       = r.get<st3_pos>(count);
    prompt.tokens    = r.get<llama_token>(count);
    const uint64_t n = r.get<uint64_t>();
    prompt.embd      = r.get<float>(n);
    prompt.images    = r.get<st3_span>(r.get<uint32_t>());

    const auto n_rows   = prompt.n_rows();
    const auto n_images = std::count(prompt.tokens.begin(), prompt.tokens.end(), LLAMA_TOKEN_NULL);

    bool ok = n_rows > 0 && n == (uint64_t) n_images * model.hparams.n_embd_inp();
    for (uint32_t i = 0; ok && i < n_rows; ++i) {
        const auto place = st3_place::of(prompt.pos[i]);
        ok               = possible(place) && (i == 0 ? place.pos >= 0 : st3_place::of(prompt.pos[i - 1]) < place) &&
             (model.hparams.n_pos_per_embd() > 1 || place == st3_place{ prompt.p0() + (llama_pos) i });
    }
    uint64_t seen = 0;  // rows up to the end of an image
    for (const auto & span : prompt.images) {
        ok = ok && span.n > 0 && span.row >= seen && span.row + (uint64_t) span.n <= n_rows &&
             uint64_t(span.nx) * span.ny == span.n && span.causal <= 1;
        seen = span.row + (uint64_t) span.n;
        for (uint32_t i = 0; ok && i < span.n; ++i) {
            ok = prompt.tokens[span.row + i] == LLAMA_TOKEN_NULL;
        }
    }
    uint64_t n_span = 0;
    for (const auto & span : prompt.images) {
        n_span += span.n;
    }
    ok = ok && n_span == (uint64_t) n_images;
    for (const llama_token token : prompt.tokens) {
        ok = ok && (token == LLAMA_TOKEN_NULL || (token >= 0 && (uint32_t) token < model.vocab.n_tokens()));
    }
    if (!ok) {
        st3_fail("the saved state holds an impossible prompt");
    }
    return prompt;
}

void st3_put(st3_writer & w, const llama_kv_cells & cells, uint32_t i, const std::vector<llama_seq_id> & seqs) {
    w.put(cells.pos_get(i));
    w.put(llama_pos(0));  // a shift: a pruned cache has none
    w.put(cells.ext_get(i).x);
    w.put(cells.ext_get(i).y);
    w.put(cells.ext_get(i).tok);

    const auto has = [&](llama_seq_id id) { return cells.seq_has(i, id); };
    w.put((uint32_t) std::count_if(seqs.begin(), seqs.end(), has));
    for (const auto id : seqs) {
        if (has(id)) {
            w.put(id);
        }
    }
}

st3_saved_cell st3_get_cell(st3_reader & r) {
    st3_saved_cell cell;
    cell.pos         = r.get<llama_pos>();
    const auto shift = r.get<llama_pos>();
    cell.ext.x       = r.get<llama_pos>();
    cell.ext.y       = r.get<llama_pos>();
    cell.ext.tok     = r.get<llama_token>();
    cell.seqs        = r.get<llama_seq_id>(r.get<uint32_t>());

    if (cell.seqs.empty() || cell.pos < 0 || cell.pos > ST3_MAX_POS || shift != 0) {
        st3_fail("the saved state holds an impossible cell");
    }
    return cell;
}
