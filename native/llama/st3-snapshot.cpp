// st3-snapshot.cpp - saving and restoring st3_memory. One section, little-endian as llama.cpp's own:
//
//   u32 magic, u32 version, u64 length of the body, u64 checksum of the body, body:
//     shape   u32 n_layer, n_stage, type_k, type_v; i32 cuts[n_stage - 1]; u32 n_embd_k, n_embd_v of each layer;
//             from version 3 on, u64 checksum of the schedule's other fields
//     i32     the sequence saved, or -1: all
//     images  u32 n, then each: i32 sequence, its fields (version 1: without weights, all of which are 1; up to version 3:
//             positions alone for places)
//     prompts u32 n, then each: i32 sequence, u32 waits (else it was asked), its fields (from version 3 on; in version 3:
//             the first position alone, from which the others count)
//     stages  each: u32 n cells, then each: i32 position, i32 shift not yet applied, i32 x, y, token, u32 n and i32 sequences
//             and for each of its layers the rows of K, the rows of V
//
// A section is read and checked in full before anything is touched; what is left then cannot fail but for want of memory,
// which is asked for before the old cells go.

#include "llama-context.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"
#include "st3-bytes.h"
#include "st3-memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace {

constexpr uint32_t MAGIC   = 0x53335453;  // "ST3S"
constexpr uint32_t VERSION = 4;

// Larger ones cannot have come from a decode; and arithmetic on positions, ours and llama.cpp's, must not overflow.
constexpr llama_pos MAX_POS = 1 << 30;

struct header {
    uint32_t magic;
    uint32_t version;
    uint64_t length;
    uint64_t checksum;
};

struct saved_cell {
    llama_pos                 pos;
    llama_pos                 shift;
    llama_kv_cell_ext         ext;
    std::vector<llama_seq_id> seqs;
};

struct saved_stage {
    std::vector<saved_cell>      cells;
    std::vector<const uint8_t *> k;  // [layer] rows of all cells
    std::vector<const uint8_t *> v;
};

struct snapshot {
    std::vector<std::pair<llama_seq_id, st3_image>> images;
    std::vector<saved_stage>                        stages;

    struct prompt_t {
        llama_seq_id seq_id;
        bool         waits;
        st3_prompt   rows;
    };

    std::vector<prompt_t> prompts;
};

void put_shape(st3_writer & w, const st3_memory & mem, uint32_t version) {
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
    if (version < 3) {
        return;
    }
    const auto & s = mem.schedule;
    st3_writer   rest;
    for (const double x : { s.keep, s.min_share, s.coverage, s.anneal_floor }) {
        rest.put(x);
    }
    for (const uint32_t x : { s.min_keep, s.seed, (uint32_t) s.anneal, s.anneal_tokens, s.anneal_interval,
                              (uint32_t) (s.random | s.merge << 1 | s.distance << 2 | s.anneal_random << 3) }) {
        rest.put(x);
    }
    for (const char c : s.score + ' ' + s.anneal_score) {
        rest.put(c);
    }
    w.put(st3_checksum(rest.data));
}

void put_image(st3_writer & w, llama_seq_id seq_id, const st3_image & image) {
    w.put(seq_id);
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

bool possible(const st3_place & p) {
    return p.pos >= -1 && p.pos <= MAX_POS && p.y >= 0 && p.y <= MAX_POS && p.x >= 0 && p.x <= MAX_POS;
}

st3_image get_image(st3_reader & r, const st3_memory & mem, uint32_t version) {
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
    if (version < 4) {
        for (const llama_pos p : r.get<llama_pos>(n)) {
            image.places.push_back({ p });
        }
    } else {
        image.places = r.get<st3_place>(n);
    }
    const auto n_counts = r.get<uint32_t>();
    image.n0            = r.get<uint32_t>(n_counts);
    const auto n_scores = r.get<uint32_t>();

    if (n == 0 || uint64_t(image.nx) * image.ny != n || flags > 3 || n_counts != (image.pruned ? mem.n_stage() : 0) ||
        (n_scores != 0 && (!image.pruned || n_scores != mem.n_stage() || image.n_records == 0)) ||
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

    const auto n_weights = version < 2 ? 0 : r.get<uint32_t>();
    if (n_weights != 0 && (!image.pruned || n_weights != mem.n_stage())) {
        st3_fail("the saved state holds an impossible image");
    }
    image.weights = get_each(n_weights, [n](float x) { return x >= 0.0f && x <= (float) n; });
    return image;
}

void put_prompt(st3_writer & w, llama_seq_id seq_id, bool waits, const st3_prompt & prompt) {
    w.put(seq_id);
    w.put((uint32_t) waits);
    w.put(prompt.n_rows());
    w.put(prompt.pos);
    w.put(prompt.tokens);
    w.put((uint64_t) prompt.embd.size());
    w.put(prompt.embd);
    w.put((uint32_t) prompt.images.size());
    w.put(prompt.images);
}

st3_prompt get_prompt(st3_reader & r, const llama_model & model, uint32_t version) {
    const auto p0    = version < 4 ? r.get<llama_pos>() : 0;
    const auto count = r.get<uint32_t>();

    st3_prompt prompt;
    if (version < 4 && (p0 < 0 || p0 > MAX_POS || count > MAX_POS)) {
        st3_fail("the saved state holds an impossible prompt");
    } else if (version < 4) {
        prompt.tokens = r.get<llama_token>(count);
        for (uint32_t i = 0; i < count; ++i) {
            prompt.pos.push_back({ p0 + (llama_pos) i, 0, 0, 0 });
        }
    } else {
        prompt.pos    = r.get<st3_pos>(count);
        prompt.tokens = r.get<llama_token>(count);
    }
    const uint64_t n    = r.get<uint64_t>();
    prompt.embd         = r.get<float>(n);
    prompt.images       = r.get<st3_span>(r.get<uint32_t>());
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
             uint64_t(span.nx) * span.ny == span.n;
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

}  // namespace

void st3_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        st3_fail("states are kept on the host only");
    }
    const_cast<st3_memory *>(this)->absorb();  // scores that are on their way are part of the state
    synchronize();

    st3_writer w;
    put_shape(w, *this, VERSION);
    w.put(seq_id);

    std::vector<llama_seq_id> seqs;
    for (llama_seq_id id = 0; id < (llama_seq_id) n_seq_max; ++id) {
        if (seq_id < 0 || id == seq_id) {
            seqs.push_back(id);
        }
    }
    uint32_t n_images = 0;
    for (const auto id : seqs) {
        n_images += (uint32_t) images.of(id).size();
    }
    w.put(n_images);
    for (const auto id : seqs) {
        for (const auto & image : images.of(id)) {
            put_image(w, id, image);
        }
    }
    uint32_t n_prompts = 0;
    for (const auto id : seqs) {
        n_prompts += (waits.of(id) ? 1 : 0) + (waits.asked.count(id) ? (uint32_t) waits.asked.at(id).size() : 0);
    }
    w.put(n_prompts);
    for (const auto id : seqs) {
        if (const auto it = waits.asked.find(id); it != waits.asked.end()) {
            for (const auto & prompt : it->second) {
                put_prompt(w, id, false, *prompt);
            }
        }
        if (const auto * prompt = waits.of(id)) {
            put_prompt(w, id, true, *prompt);
        }
    }

    for (const auto & stage : stages) {
        std::vector<std::pair<uint32_t, uint32_t>> picked;  // (stream, cell)
        for (uint32_t t = 0; t < stage->get_n_stream(); ++t) {
            const auto & cells = stage->cells(t);
            for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
                if (!cells.is_empty(i) && (seq_id < 0 || cells.seq_has(i, seq_id))) {
                    picked.push_back({ t, i });
                }
            }
        }
        w.put((uint32_t) picked.size());
        for (const auto & [t, i] : picked) {
            const auto & cells = stage->cells(t);
            const auto & ext   = cells.ext_get(i);
            if (cells.pos_get(i) - cells.get_shift(i) < 0) {
                st3_fail("positions were divided: decode once before the state is saved");
            }
            w.put(cells.pos_get(i));
            w.put(cells.get_shift(i));
            w.put(ext.x);
            w.put(ext.y);
            w.put(ext.tok);

            std::vector<llama_seq_id> owners;
            for (const auto id : seqs) {
                if (cells.seq_has(i, id)) {
                    owners.push_back(id);
                }
            }
            w.put((uint32_t) owners.size());
            w.put(owners);
        }
        for (size_t l = 0; l < stage->n_layers(); ++l) {
            for (const bool is_k : { true, false }) {
                for (size_t i = 0; i < picked.size();) {
                    size_t n = 1;  // a run of neighbours
                    while (i + n < picked.size() && picked[i + n].first == picked[i].first &&
                           picked[i + n].second == picked[i].second + n) {
                        n++;
                    }
                    ggml_tensor * t = is_k ? stage->k_of(l, picked[i].first) : stage->v_of(l, picked[i].first);
                    ggml_backend_tensor_get(t, w.make(n * t->nb[1]), picked[i].second * t->nb[1], n * t->nb[1]);
                    i += n;
                }
            }
        }
    }

    const header h = { MAGIC, VERSION, w.data.size(), st3_checksum(w.data) };
    io.write(&h, sizeof(h));
    io.write(w.data.data(), w.data.size());
}

void st3_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        st3_fail("states are kept on the host only");
    }
    if (seq_id < -1 || seq_id >= (llama_seq_id) n_seq_max) {
        st3_fail(format("there is no sequence %d", seq_id));
    }

    //
    // read
    //

    header h;
    io.read(&h, sizeof(h));
    if (h.magic != MAGIC || h.version < 1 || h.version > VERSION) {
        st3_fail("this is no saved state of this version of st3");
    }
    std::vector<uint8_t> body;
    while (body.size() < h.length) {  // a wrong length must not become an allocation of that size
        const size_t n = std::min<uint64_t>(h.length - body.size(), 64u << 20);
        body.resize(body.size() + n);
        io.read(body.data() + body.size() - n, n);
    }
    if (st3_checksum(body) != h.checksum) {
        st3_fail("the saved state is damaged");
    }

    //
    // check
    //

    st3_reader r(body);
    st3_writer shape;
    put_shape(shape, *this, h.version);
    if (memcmp(r.take(shape.data.size()), shape.data.data(), shape.data.size()) != 0) {
        st3_fail("the saved state belongs to another model, schedule or KV cache type");
    }
    const auto saved_seq = r.get<llama_seq_id>();
    if ((saved_seq < 0) != (seq_id < 0)) {
        st3_fail(seq_id < 0 ? "the saved state is that of one sequence" : "the saved state is that of a whole context");
    }

    // the sequence that a saved one becomes
    const auto becomes = [&](llama_seq_id id) {
        if (seq_id < 0 ? id < 0 || id >= (llama_seq_id) n_seq_max : id != saved_seq) {
            st3_fail(format("the saved state names sequence %d", id));
        }
        return seq_id < 0 ? id : seq_id;
    };

    snapshot   snap;
    const auto n_images = r.get<uint32_t>();
    for (uint32_t i = 0; i < n_images; ++i) {
        const auto id = becomes(r.get<llama_seq_id>());
        snap.images.emplace_back(id, get_image(r, *this, h.version));
    }
    const auto n_prompts = h.version < 3 ? 0 : r.get<uint32_t>();
    for (uint32_t i = 0; i < n_prompts; ++i) {
        const auto id    = becomes(r.get<llama_seq_id>());
        const auto waits = r.get<uint32_t>();
        if (waits > 1) {
            st3_fail("the saved state holds an impossible prompt");
        }
        snap.prompts.push_back({ id, waits == 1, get_prompt(r, model, h.version) });
    }

    std::vector<std::vector<uint32_t>> need;  // [stage][stream] cells that come
    for (const auto & stage : stages) {
        saved_stage s;
        need.emplace_back(stage->get_n_stream());

        const auto n_cells = r.get<uint32_t>();
        for (uint32_t i = 0; i < n_cells; ++i) {
            saved_cell cell;
            cell.pos     = r.get<llama_pos>();
            cell.shift   = r.get<llama_pos>();
            cell.ext.x   = r.get<llama_pos>();
            cell.ext.y   = r.get<llama_pos>();
            cell.ext.tok = r.get<llama_token>();

            const auto owners    = r.get<llama_seq_id>(r.get<uint32_t>());
            const auto unshifted = int64_t(cell.pos) - cell.shift;
            if (owners.empty() || cell.pos < 0 || cell.pos > MAX_POS || unshifted < 0 || unshifted > MAX_POS) {
                st3_fail("the saved state holds an impossible cell");
            }
            for (const auto id : owners) {
                cell.seqs.push_back(becomes(id));
                if (std::count(owners.begin(), owners.end(), id) != 1 ||
                    stage->get_stream(cell.seqs.back()) != stage->get_stream(cell.seqs[0])) {
                    st3_fail("the saved state holds an impossible cell");
                }
            }
            need.back()[stage->get_stream(cell.seqs[0])]++;
            s.cells.push_back(std::move(cell));
        }
        for (size_t l = 0; l < stage->n_layers(); ++l) {
            s.k.push_back(r.take(n_cells * stage->k_of(l, 0)->nb[1]));
            s.v.push_back(r.take(n_cells * stage->v_of(l, 0)->nb[1]));
        }
        snap.stages.push_back(std::move(s));
    }
    if (!r.done()) {
        st3_fail("the saved state has something after its end");
    }

    //
    // make room, before anything goes
    //

    absorb();
    synchronize();
    for (uint32_t s = 0; s < n_stage(); ++s) {
        auto & stage = *stages[s];
        for (uint32_t t = 0; t < stage.get_n_stream(); ++t) {
            uint32_t stays = 0;  // cells that the restored sequence does not free
            if (seq_id >= 0) {
                const auto & cells = stage.cells(t);
                for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
                    stays += !cells.is_empty(i) && !(cells.seq_has(i, seq_id) && cells.seq_count(i) == 1);
                }
            }
            const uint32_t n = need[s][t] + stays;
            if (n > stage.n_max) {
                st3_fail(format("the saved state needs %u KV cells of %u", n, stage.n_max));
            }
            if (n > stage.get_size() && stage.get_has_shift()) {
                st3_fail("a context shift is pending: decode once before a state is restored");
            }
            if (n > stage.get_size() && !stage.fit(n)) {
                st3_fail("no memory for the saved state");
            }
        }
    }

    //
    // restore
    //

    if (seq_id < 0) {
        clear(false);
    } else {
        seq_rm(seq_id, -1, -1);
    }
    for (auto & [id, image] : snap.images) {
        images.of(id).push_back(std::move(image));
    }
    for (auto & prompt : snap.prompts) {
        if (prompt.waits) {
            waits.waiting[prompt.seq_id] = std::move(prompt.rows);
        } else {
            waits.asked[prompt.seq_id].push_back(std::make_shared<const st3_prompt>(std::move(prompt.rows)));
        }
    }
    for (uint32_t s = 0; s < n_stage(); ++s) {
        auto &                stage = *stages[s];
        const auto &          saved = snap.stages[s];
        std::vector<uint32_t> next(stage.get_n_stream());  // free cells are looked for from here on

        for (size_t i = 0; i < saved.cells.size(); ++i) {
            const auto &   cell  = saved.cells[i];
            const uint32_t t     = stage.get_stream(cell.seqs[0]);
            auto &         cells = stage.cells(t);

            while (!cells.is_empty(next[t])) {
                next[t]++;
            }
            const uint32_t at = next[t];
            cells.pos_set(at, cell.pos - cell.shift);
            cells.ext_set(at, cell.ext);
            for (const auto id : cell.seqs) {
                cells.seq_add(at, id);
            }
            if (cell.shift != 0) {
                cells.pos_add(at, cell.shift);
            }
            for (size_t l = 0; l < stage.n_layers(); ++l) {
                ggml_tensor * k = stage.k_of(l, t);
                ggml_tensor * v = stage.v_of(l, t);
                ggml_backend_tensor_set(k, saved.k[l] + i * k->nb[1], at * k->nb[1], k->nb[1]);
                ggml_backend_tensor_set(v, saved.v[l] + i * v->nb[1], at * v->nb[1], v->nb[1]);
            }
        }
    }
}
