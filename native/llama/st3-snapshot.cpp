// st3-snapshot.cpp - saving and restoring st3_memory. One section, little-endian as llama.cpp's own:
//
//   u32 magic, u32 version, u64 length of the body, body, u64 checksum of the body, exclusive or the version. The body:
//     shape   u32 n_layer, n_stage, type_k, type_v; i32 cuts[n_stage - 1]; u32 n_embd_k, n_embd_v of each layer; u64 checksum
//             of the schedule's other fields
//     i32     the sequence saved, or -1: all
//     images  u32 n, then each: i32 sequence, its fields
//     prompts u32 n, then each: i32 sequence, u32 waits (else it was asked), its fields
//     stages  each: u32 n cells, then each: i32 position, i32 0, i32 x, y, token, u32 n and i32 sequences
//             and for each of its layers the rows of K, the rows of V
//
// It is written as a stream, and no tensor is read where only its size is asked for. It is read and checked in full before anything
// is touched; what is left then cannot fail but for want of memory, which is asked for before the old cells go.

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-memory.h"
#include "st3-saved.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

namespace {

constexpr uint32_t MAGIC   = 0x53335453;  // "ST3S"
constexpr uint32_t VERSION = 5;

struct header {
    uint32_t magic;
    uint32_t version;
    uint64_t length;
};

// Cells [first, first + n) of a stream.
struct run_t {
    uint32_t stream;
    uint32_t first;
    uint32_t n;
};

// Adds a cell to runs of neighbours.
void add_cell(std::vector<run_t> & runs, uint32_t stream, uint32_t cell) {
    if (!runs.empty() && runs.back().stream == stream && runs.back().first + runs.back().n == cell) {
        runs.back().n++;
    } else {
        runs.push_back({ stream, cell, 1 });
    }
}

struct saved_stage {
    std::vector<st3_saved_cell>  cells;
    std::vector<uint32_t>        need;  // [stream] cells that come
    std::vector<const uint8_t *> k;     // [layer] rows of all cells
    std::vector<const uint8_t *> v;
};

struct snapshot {
    struct prompt_t {
        llama_seq_id seq_id;
        bool         waits;
        st3_prompt   rows;
    };

    std::vector<std::pair<llama_seq_id, st3_image>> images;
    std::vector<prompt_t>                           prompts;
    std::vector<saved_stage>                        stages;
};

void put_body(st3_writer & w, const st3_memory & mem, llama_seq_id seq_id) {
    st3_put_shape(w, mem);
    w.put(seq_id);

    std::vector<llama_seq_id> seqs;
    for (llama_seq_id id = 0; id < (llama_seq_id) mem.n_seq_max; ++id) {
        if (seq_id < 0 || id == seq_id) {
            seqs.push_back(id);
        }
    }
    uint32_t n_images = 0;
    for (const auto id : seqs) {
        n_images += (uint32_t) mem.images.of(id).size();
    }
    w.put(n_images);
    for (const auto id : seqs) {
        for (const auto & image : mem.images.of(id)) {
            w.put(id);
            st3_put(w, image);
        }
    }

    std::vector<std::pair<llama_seq_id, const st3_prompt *>> prompts;
    for (const auto id : seqs) {
        if (const auto it = mem.waits.asked.find(id); it != mem.waits.asked.end()) {
            for (const auto & prompt : it->second) {
                prompts.emplace_back(id, prompt.get());
            }
        }
        if (const auto * prompt = mem.waits.of(id)) {
            prompts.emplace_back(id, prompt);
        }
    }
    w.put((uint32_t) prompts.size());
    for (const auto & [id, prompt] : prompts) {
        w.put(id);
        w.put((uint32_t) (prompt == mem.waits.of(id)));
        st3_put(w, *prompt);
    }

    for (uint32_t s = 0; s < mem.n_stage(); ++s) {
        const auto &       stage = mem.stage(s);
        std::vector<run_t> runs;
        uint32_t           n_cells = 0;
        for (uint32_t t = 0; t < stage.get_n_stream(); ++t) {
            const auto & cells = stage.cells(t);
            for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
                if (!cells.is_empty(i) && (seq_id < 0 || cells.seq_has(i, seq_id))) {
                    add_cell(runs, t, i);
                    n_cells++;
                }
            }
        }
        w.put(n_cells);
        for (const auto & run : runs) {
            for (uint32_t i = 0; i < run.n; ++i) {
                st3_put(w, stage.cells(run.stream), run.first + i, seqs);
            }
        }
        for (size_t l = 0; l < stage.n_layers(); ++l) {
            for (const bool is_k : { true, false }) {
                for (const auto & run : runs) {
                    const auto * t = is_k ? stage.k_of(l, run.stream) : stage.v_of(l, run.stream);
                    w.put(t, run.first * t->nb[1], run.n * t->nb[1]);
                }
            }
        }
    }
}

// What stands behind a body with that checksum: a damaged version must not pass for another, which it could be read as.
uint64_t seal(uint64_t checksum) { return checksum ^ VERSION; }

// The body, which is what was saved: its checksum is right.
std::vector<uint8_t> read_section(llama_io_read_i & io) {
    header h;
    io.read(&h, sizeof(h));
    if (h.magic != MAGIC || h.version != VERSION) {
        st3_fail("this is no saved state of this version of st3");
    }
    std::vector<uint8_t> body;
    while (body.size() < h.length) {  // a wrong length must not become an allocation of that size
        const size_t n = std::min<uint64_t>(h.length - body.size(), 64u << 20);
        body.resize(body.size() + n);
        io.read(body.data() + body.size() - n, n);
    }
    uint64_t checksum = 0;
    io.read(&checksum, sizeof(checksum));
    st3_checksum sum;
    sum.add(body.data(), body.size());
    if (seal(sum.value()) != checksum) {
        st3_fail("the saved state is damaged");
    }
    return body;
}

// Those places of an image that a stage holds.
std::set<st3_place> places_in(const saved_stage & stage, llama_seq_id seq_id, const st3_image & image) {
    const std::set<st3_place> places(image.places.begin(), image.places.end());

    std::set<st3_place> res;
    for (const auto & cell : stage.cells) {
        const st3_place place = { cell.pos, cell.ext.y, cell.ext.x };
        if (places.count(place) > 0 && std::count(cell.seqs.begin(), cell.seqs.end(), seq_id) > 0) {
            res.insert(place);
        }
    }
    return res;
}

// Reads a body that is to become sequence seq_id, or everything, and checks it.
snapshot get_body(st3_reader & r, const st3_memory & mem, const llama_model & model, llama_seq_id seq_id) {
    st3_io_bytes shape;
    st3_writer   shape_writer(shape);
    st3_put_shape(shape_writer, mem);
    if (memcmp(r.take(shape.data.size()), shape.data.data(), shape.data.size()) != 0) {
        st3_fail("the saved state belongs to another model, schedule or KV cache type");
    }
    const auto saved_seq = r.get<llama_seq_id>();
    if ((saved_seq < 0) != (seq_id < 0)) {
        st3_fail(seq_id < 0 ? "the saved state is that of one sequence" : "the saved state is that of a whole context");
    }

    // the sequence that a saved one becomes
    const auto becomes = [&](llama_seq_id id) {
        if (seq_id < 0 ? id < 0 || id >= (llama_seq_id) mem.n_seq_max : id != saved_seq) {
            st3_fail(format("the saved state names sequence %d", id));
        }
        return seq_id < 0 ? id : seq_id;
    };

    snapshot   snap;
    const auto n_images = r.get<uint32_t>();
    for (uint32_t i = 0; i < n_images; ++i) {
        const auto id = becomes(r.get<llama_seq_id>());
        snap.images.emplace_back(id, st3_get_image(r, mem));
    }
    const auto n_prompts = r.get<uint32_t>();
    for (uint32_t i = 0; i < n_prompts; ++i) {
        const auto   id    = becomes(r.get<llama_seq_id>());
        const auto   waits = r.get<uint32_t>();
        auto         rows  = st3_get_prompt(r, model);
        // in order, and what waits is the last
        const auto * last  = i > 0 && snap.prompts.back().seq_id == id ? &snap.prompts.back() : nullptr;
        if (waits > 1 || (last && (last->waits || last->rows.end() > rows.p0()))) {
            st3_fail("the saved state holds an impossible prompt");
        }
        snap.prompts.push_back({ id, waits == 1, std::move(rows) });
    }

    for (uint32_t s = 0; s < mem.n_stage(); ++s) {
        const auto & stage = mem.stage(s);
        saved_stage  saved;
        saved.need.resize(stage.get_n_stream());

        const auto n_cells = r.get<uint32_t>();
        for (uint32_t i = 0; i < n_cells; ++i) {
            auto cell = st3_get_cell(r);
            for (auto & id : cell.seqs) {
                id = becomes(id);
            }
            for (const auto id : cell.seqs) {
                if (std::count(cell.seqs.begin(), cell.seqs.end(), id) != 1 ||
                    stage.get_stream(id) != stage.get_stream(cell.seqs[0])) {
                    st3_fail("the saved state holds an impossible cell");
                }
            }
            saved.need[stage.get_stream(cell.seqs[0])]++;
            saved.cells.push_back(std::move(cell));
        }
        for (size_t l = 0; l < stage.n_layers(); ++l) {
            saved.k.push_back(r.take(n_cells * stage.k_of(l, 0)->nb[1]));
            saved.v.push_back(r.take(n_cells * stage.v_of(l, 0)->nb[1]));
        }
        snap.stages.push_back(std::move(saved));
    }
    if (!r.done()) {
        st3_fail("the saved state has something after its end");
    }
    for (const auto & [id, image] : snap.images) {
        for (uint32_t s = 1; !image.pruned && s < mem.n_stage(); ++s) {
            if (places_in(snap.stages[s], id, image) != places_in(snap.stages[0], id, image)) {
                st3_fail("the saved state holds an image that waits for its cuts and lacks a part");
            }
        }
    }
    return snap;
}

// Makes a stage hold what comes beside what the restored sequence does not free.
void make_room(st3_kv & stage, const std::vector<uint32_t> & need, llama_seq_id seq_id) {
    for (uint32_t t = 0; t < stage.get_n_stream(); ++t) {
        uint32_t     n     = need[t];
        const auto & cells = stage.cells(t);
        for (uint32_t i = 0; seq_id >= 0 && i < cells.used_max_p1(); ++i) {
            n += !cells.is_empty(i) && !(cells.seq_has(i, seq_id) && cells.seq_count(i) == 1);
        }
        if (n > stage.n_max) {
            st3_fail(format("the saved state needs %u KV cells of %u", n, stage.n_max));
        }
        if (n > stage.get_size() && !stage.fit(n)) {
            st3_fail("no memory for the saved state");
        }
    }
}

void restore(st3_kv & stage, const saved_stage & saved) {
    std::vector<uint32_t> next(stage.get_n_stream());  // free cells are looked for from here on
    std::vector<run_t>    runs;

    for (const auto & cell : saved.cells) {
        const uint32_t t     = stage.get_stream(cell.seqs[0]);
        auto &         cells = stage.cells(t);

        while (!cells.is_empty(next[t])) {
            next[t]++;
        }
        const uint32_t at = next[t];
        cells.pos_set(at, cell.pos);
        cells.ext_set(at, cell.ext);
        for (const auto id : cell.seqs) {
            cells.seq_add(at, id);
        }
        add_cell(runs, t, at);
    }
    for (size_t l = 0; l < stage.n_layers(); ++l) {
        for (const bool is_k : { true, false }) {
            const uint8_t * rows = is_k ? saved.k[l] : saved.v[l];
            for (const auto & run : runs) {
                ggml_tensor * t = is_k ? stage.k_of(l, run.stream) : stage.v_of(l, run.stream);
                ggml_backend_tensor_set(t, rows, run.first * t->nb[1], run.n * t->nb[1]);
                rows += run.n * t->nb[1];
            }
        }
    }
}

}  // namespace

void st3_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        st3_fail("states are kept on the host only");
    }
    const_cast<st3_memory *>(this)->absorb();  // scores that are on their way are part of the state
    synchronize();

    header h = { MAGIC, VERSION, 0 };
    if (!io.only_counts()) {
        st3_io_count length;
        st3_writer   w(length);
        put_body(w, *this, seq_id);
        h.length = length.n_bytes();
    }
    io.write(&h, sizeof(h));
    st3_writer w(io);
    put_body(w, *this, seq_id);
    const uint64_t checksum = seal(w.checksum());
    io.write(&checksum, sizeof(checksum));
}

void st3_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        st3_fail("states are kept on the host only");
    }
    if (seq_id < -1 || seq_id >= (llama_seq_id) n_seq_max) {
        st3_fail(format("there is no sequence %d", seq_id));
    }
    const auto body = read_section(io);

    st3_reader r(body);
    auto       snap = get_body(r, *this, model, seq_id);

    absorb();
    synchronize();
    for (uint32_t s = 0; s < n_stage(); ++s) {
        make_room(*stages[s], snap.stages[s].need, seq_id);
    }

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
        restore(*stages[s], snap.stages[s]);
    }
}
