#include "st3-memory.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-owners.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <tuple>

//
// st3_memory
//

st3_memory::st3_memory(
        const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
        st3_schedule schedule_) :
    schedule(std::move(schedule_)),
    n_seq_max(cparams.n_seq_max),
    model(model),
    unified(cparams.kv_unified) {
    for (uint32_t i = 0; i < schedule.n_stage(); ++i) {
        stages.push_back(
                std::make_unique<st3_kv>(model, params, cparams, [&](int32_t il) { return schedule.stage(il) == i; }));
    }
}

void st3_belongs_to(llama_memory_i * memory, llama_context * ctx) {
    if (auto * mem = dynamic_cast<st3_memory *>(memory)) {
        mem->belongs_to(ctx);
    }
}

void st3_memory::synchronize() const {
    // the context's own function would end what it times, in the middle of a decode
    if (lctx->get_sched()) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
}

uint64_t st3_memory::generation() const {
    uint64_t res = 0;
    for (const auto & s : stages) {
        res += s->generation();
    }
    return res;
}

ggml_backend_dev_t st3_memory::device(int32_t il) const {
    return ggml_backend_buft_get_device(
            ggml_backend_buffer_get_type(stages[schedule.stage(il)]->get_k_storage(il)->buffer));
}

const llama_layer & st3_memory::layer(int32_t il) const { return model.layers[il]; }

int32_t st3_memory::n_window() const { return model.hparams.is_swa_any() ? (int32_t) model.hparams.n_swa : 0; }

uint32_t st3_memory::n_used(llama_seq_id seq_id) const {
    uint32_t res = 0;
    for (const auto & s : stages) {
        res = std::max(res, s->n_used(s->get_stream(seq_id)));
    }
    return res;
}

bool st3_memory::has_unpruned(llama_seq_id seq_id) const {
    const auto & list = images.of(seq_id);
    return std::any_of(list.begin(), list.end(), [](const st3_image & image) { return !image.pruned; });
}

bool st3_memory::make_room_in_graph(uint32_t n_images, uint32_t n_rows) {
    const bool more = n_images > most_images || n_rows > most_rows;
    most_images     = std::max(most_images, n_images);
    most_rows       = std::max(most_rows, n_rows);
    return more;
}

const st3_account * st3_memory::account(llama_seq_id seq_id) const {
    const auto it = accounts.find(seq_id < 0 ? last_seq : seq_id);
    return it == accounts.end() ? nullptr : &it->second;
}

st3_memory::held_t st3_memory::held(llama_seq_id seq_id, const st3_image & image, uint32_t stage) const {
    llama_pos p0 = std::numeric_limits<llama_pos>::max(), p1 = -1;
    for (const auto & place : image.places) {
        if (place.pos >= 0) {
            p0 = std::min(p0, place.pos);
            p1 = std::max(p1, place.pos);
        }
    }
    const auto cells = st3_by_place(stages[stage]->get_cells(seq_id), seq_id, p0, p1);

    held_t    res;
    auto      it = cells.begin();
    st3_place last;
    for (uint32_t i = 0; i < image.places.size(); ++i) {
        const auto & place = image.places[i];
        if (place.pos < 0) {
            continue;
        }
        if (place < last) {  // they ascend as a rule
            it = cells.begin();
        }
        while (it != cells.end() && it->place < place) {
            ++it;
        }
        if (it != cells.end() && it->place == place) {
            res.ids.push_back(i);
            res.cells.push_back(it->cell);
        }
        last = place;
    }
    return res;
}

uint32_t st3_memory::n_held(llama_seq_id seq_id, const st3_image & image, uint32_t stage) const {
    return (uint32_t) held(seq_id, image, stage).ids.size();
}

uint32_t st3_memory::n_given(llama_seq_id seq_id) const {
    auto res = (uint32_t) stages[0]->get_cells(seq_id).seq_pos_get(seq_id).size();
    for (const auto & image : images.of(seq_id)) {
        res += image.n_there() - n_held(seq_id, image, 0);
    }
    return res;
}

//
// a batch, before the compute
//

bool st3_memory::fit(const std::vector<llama_ubatch> & ubatches, const st3_plan * plan) {
    for (uint32_t s = 0; s < n_stage(); ++s) {
        std::vector<uint32_t> need(stages[s]->get_n_stream());
        for (uint32_t i = 0; i < need.size(); ++i) {
            need[i] = stages[s]->n_used(i);
        }
        for (const auto & ubatch : ubatches) {
            const auto & rows = plan ? plan->ubatches[s] : ubatch;
            for (uint32_t i = 0; i < rows.n_tokens; ++i) {
                need[stages[s]->get_stream(rows.seq_id[i][0])]++;
            }
        }
        const uint32_t n = *std::max_element(need.begin(), need.end());
        if (!stages[s]->fits(n)) {
            synchronize();
        }
        if (!stages[s]->fit(n)) {
            return false;
        }
        stages[s]->rewind();
    }
    return true;
}

// Ubatches of at most n_ubatch rows; a pruned prompt is one, however long. None if the batch cannot be split.
std::vector<llama_ubatch> st3_memory::split(llama_batch_allocr & balloc, uint32_t n_ubatch) const {
    const uint32_t n_max = expected.empty() ? n_ubatch : balloc.get_n_tokens();

    std::vector<llama_ubatch> res;
    balloc.split_reset();
    while (balloc.get_n_used() < balloc.get_n_tokens()) {
        auto ubatch = unified ? balloc.split_simple(n_max) : balloc.split_equal(n_max, true, 0);
        if (ubatch.n_tokens == 0) {
            return {};
        }
        res.push_back(std::move(ubatch));
    }
    return res;
}

// What each sequence has of a batch.
std::map<llama_seq_id, st3_memory::share_t> st3_memory::shares_of(const std::vector<llama_ubatch> & ubatches) {
    std::map<llama_seq_id, share_t> res;
    for (size_t u = 0; u < ubatches.size(); ++u) {
        for (uint32_t i = 0; i < ubatches[u].n_tokens; ++i) {
            for (int32_t j = 0; j < ubatches[u].n_seq_id[i]; ++j) {
                auto & share = res[ubatches[u].seq_id[i][j]];
                share.n++;
                share.last = u;
                share.output |= ubatches[u].output[i] != 0;
            }
        }
    }
    return res;
}

// [stage][ubatch]; none if there is no room, with everything as it was.
std::vector<llama_kv_cache::slot_info_vec_t>
st3_memory::find_slots(const std::vector<llama_ubatch> & ubatches, const st3_plan * plan) {
    std::vector<llama_kv_cache::slot_info_vec_t> res;
    if (!fit(ubatches, plan)) {
        return res;
    }
    for (uint32_t s = 0; s < n_stage(); ++s) {
        res.push_back(stages[s]->prepare(plan ? std::vector<llama_ubatch>{ plan->ubatches[s] } : ubatches));
        if (res.back().empty()) {
            return {};
        }
    }
    return res;
}

// What comes with text beside its compute: a generated token, a question, scores.
void st3_memory::add_work(
        st3_work & work, const llama_ubatch & ubatch, llama_seq_id seq_id, const share_t & share) const {
    const bool question = share.output && has_unpruned(seq_id);
    if (share.generated()) {
        work.steps.push_back(seq_id);
    }
    if (question) {
        work.questions.push_back(seq_id);
    }
    if (!images.of(seq_id).empty()) {
        auto record = make_record(ubatch, seq_id, question);
        if (record.anneal || record.cut) {
            work.records.push_back(std::move(record));
        }
    }
}

// Which tokens are the announced image's: of every sequence as many as are still to come.
void st3_memory::find_images(std::vector<st3_work> & works, const std::vector<llama_ubatch> & ubatches) const {
    const auto & announced = waits.announced;

    std::map<llama_seq_id, uint32_t> came;
    uint32_t                         most = 0;
    for (size_t u = 0; u < ubatches.size(); ++u) {
        for (uint32_t i = 0; i < ubatches[u].n_tokens; ++i) {
            for (int32_t j = 0; j < ubatches[u].n_seq_id[i]; ++j) {
                const llama_seq_id seq_id = ubatches[u].seq_id[i][j];
                auto &             n      = came[seq_id];
                if (n < announced.left) {
                    auto & part = works[u].image[seq_id];
                    part.begins |= n == 0 && announced.begins();
                    part.places.push_back(st3_place::of(ubatches[u], i));
                    most = std::max(most, ++n);
                }
            }
        }
        works[u].image_left = announced.left - most;
    }
}

llama_memory_context_ptr st3_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    const auto failed = [] { return std::make_unique<st3_memory_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE); };

    auto ubatches = split(balloc, n_ubatch);
    if (ubatches.empty()) {
        return failed();
    }
    std::unique_ptr<st3_plan> plan;
    if (!expected.empty()) {
        const auto & before = images.of(ubatches[0].seq_id[0][0]);
        plan = st3_make_plan(schedule, expected, before.empty() ? 0 : before.back().number + 1, ubatches[0]);
    }
    const bool text   = !plan && !ubatches[0].embd;
    const auto shares = text ? shares_of(ubatches) : std::map<llama_seq_id, share_t>{};

    for (const auto & [seq_id, share] : shares) {
        if (share.generated()) {
            anneal(seq_id);
        }
    }
    auto slots = find_slots(ubatches, plan.get());
    if (slots.empty()) {
        return failed();
    }
    std::vector<st3_work> works(ubatches.size());
    if (plan) {
        works[0].records.push_back(make_record(*plan, slots));
    } else if (ubatches[0].embd) {
        find_images(works, ubatches);
    }
    for (const auto & [seq_id, share] : shares) {
        add_work(works[share.last], ubatches[share.last], seq_id, share);
    }
    return std::make_unique<st3_memory_context>(
            this, std::move(slots), std::move(ubatches), std::move(works), std::move(plan));
}

llama_memory_context_ptr st3_memory::init_full() {
    std::vector<llama_memory_context_ptr> ctxs;
    for (auto & stage : stages) {
        ctxs.push_back(stage->init_full());
    }
    return std::make_unique<st3_memory_context>(this, std::move(ctxs));
}

llama_memory_context_ptr st3_memory::init_update(llama_context * ctx, bool optimize) {
    std::vector<llama_memory_context_ptr> ctxs;
    for (auto & stage : stages) {
        ctxs.push_back(stage->init_update(ctx, optimize));
    }
    return std::make_unique<st3_memory_context>(this, std::move(ctxs));
}

//
// a ubatch, after the compute
//

void st3_memory::finish(
        const llama_ubatch & ubatch, st3_work & work, const st3_plan * plan,
        const std::vector<llama_kv_cache::slot_info> & slots, ggml_tensor * out, ggml_backend_sched_t sched) {
    if (plan) {
        commit(*plan, slots, work);
    } else if (ubatch.embd) {
        add_images(work);
    }
    take_account(ubatch, work, plan);
    if (out) {
        collect(std::move(work.records), out, sched);
    }
    for (const llama_seq_id seq_id : work.steps) {
        for (auto & image : images.of(seq_id)) {
            image.n_steps += image.pruned;
        }
    }
    for (const llama_seq_id seq_id : work.questions) {
        evict(seq_id);
    }
}

static std::vector<st3_place> places_of(const llama_ubatch & ubatch, uint32_t row, uint32_t n) {
    std::vector<st3_place> res;
    for (uint32_t i = row; i < row + n; ++i) {
        res.push_back(st3_place::of(ubatch, i));
    }
    return res;
}

// Embeddings that are announced as an image.
void st3_memory::add_images(const st3_work & work) {
    for (const auto & [seq_id, part] : work.image) {
        const auto & list            = images.of(seq_id);
        const bool   more            = !part.begins && !list.empty() && !list.back().pruned;
        auto &       image           = images.add(seq_id, part.places, more);
        std::tie(image.nx, image.ny) = waits.announced.grid(image.places);
    }
    waits.announced.left = work.image_left;
}

// Writes the places of the tokens that survived into the cells that hold them, and remembers the images.
void st3_memory::commit(const st3_plan & plan, const std::vector<llama_kv_cache::slot_info> & slots, st3_work & work) {
    synchronize();

    const auto & first  = plan.ubatches[0];
    const auto   seq_id = first.seq_id[0][0];
    auto &       list   = images.of(seq_id);
    const auto   i_new  = (uint32_t) list.size();

    auto &  first_of = accounts[seq_id].first;
    int32_t n_tokens = 0;
    first_of.clear();
    for (size_t i = 0; i < plan.spans.size(); ++i) {
        auto & image = images.add(seq_id, places_of(first, plan.spans[i].row, plan.spans[i].n), false);
        image.nx     = plan.spans[i].nx;
        image.ny     = plan.spans[i].ny;
        image.number = plan.number + (uint32_t) i;

        first_of[image.number] = n_tokens;
        n_tokens += (int32_t) plan.spans[i].n;
        image.pruned = true;
        for (uint32_t s = 0; s < plan.n_stage(); ++s) {
            image.n0.push_back(plan.counts[s][i]);
        }
    }

    auto & kept   = accounts[seq_id].kept;
    auto & owners = accounts[seq_id].owners;
    kept.assign(plan.n_stage() - 1, {});
    owners.assign(schedule.merge ? plan.n_stage() - 1 : 0, {});

    std::vector<st3_owners> stand_in;  // [image]
    for (const auto & span : plan.spans) {
        std::vector<int32_t> all(span.n);
        std::iota(all.begin(), all.end(), 0);
        stand_in.emplace_back(span.n, std::move(all));
    }

    for (uint32_t s = 0; s < plan.n_stage(); ++s) {
        auto & cells = stages[s]->cells(stages[s]->get_stream(seq_id));

        std::vector<st3_token> tokens;

        int32_t i_first = 0;  // index over all images of the image's first token
        for (size_t i = 0; i < plan.spans.size(); ++i) {
            std::vector<int32_t> ids(plan.counts[s][i]);
            std::iota(ids.begin(), ids.end(), 0);
            if (s > 0 && plan.kept[s - 1][i]) {
                ggml_backend_tensor_get(plan.kept[s - 1][i], ids.data(), 0, ids.size() * sizeof(int32_t));
            }
            if (s > 0 && schedule.merge) {
                std::vector<int32_t> places(plan.owners[s - 1][i] ? plan.counts[s - 1][i] : 0);
                if (!places.empty()) {
                    ggml_backend_tensor_get(plan.owners[s - 1][i], places.data(), 0, places.size() * sizeof(int32_t));
                }
                stand_in[i].cut(ids, places);
                for (const int32_t o : stand_in[i].of()) {
                    owners[s - 1].push_back(o < 0 ? o : i_first + o);
                }
            }
            if (schedule.merge) {
                list[i_new + i].weights.push_back(stand_in[i].weights());
            }

            const auto &   places = list[i_new + i].places;
            const uint32_t row    = plan.row(s, i);

            // all of them leave before any returns: a stand-in place may be another token's real one
            for (size_t j = 0; j < ids.size(); ++j) {
                cells.rm(slots[s].idxs[0][row + j]);
            }
            for (size_t j = 0; j < ids.size(); ++j) {
                const uint32_t cell = slots[s].idxs[0][row + j];
                cells.pos_set(cell, places[ids[j]].pos);
                cells.ext_set(cell, { places[ids[j]].x, places[ids[j]].y });
                cells.seq_add(cell, seq_id);
                tokens.push_back({ i_new + (uint32_t) i, (uint32_t) ids[j] });
                if (s > 0) {
                    kept[s - 1].push_back(i_first + ids[j]);
                }
            }
            i_first += (int32_t) plan.spans[i].n;
        }
        for (auto & record : work.records) {
            record.tokens[s].insert(record.tokens[s].begin(), tokens.begin(), tokens.end());
        }
    }
}

void st3_memory::trim() {
    synchronize();
    for (auto & s : stages) {
        s->fit(s->n_used_max());
    }
}

std::map<ggml_backend_buffer_type_t, size_t> st3_memory::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & s : stages) {
        for (const auto & [buft, size] : s->memory_breakdown()) {
            res[buft] += size;
        }
    }
    return res;
}
