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

static constexpr uint32_t MAX_TEXT_ROW = 512;  // scoring queries of text at most: the newest
static constexpr uint32_t PAD_IDS      = 32;

//
// st3_plan
//

uint32_t st3_plan::row(uint32_t stage, size_t image) const {
    uint32_t res = spans[image].row;
    for (size_t i = 0; i < image; ++i) {
        res -= spans[i].n - counts[stage][i];
    }
    return res;
}

uint32_t st3_plan::n_visual(uint32_t stage) const {
    return std::accumulate(counts[stage].begin(), counts[stage].end(), 0u);
}

uint32_t st3_plan::last_row(uint32_t row) const {
    uint32_t res = row;
    for (size_t i = 0; i < spans.size(); ++i) {
        if (spans[i].row < row) {
            res -= spans[i].n - counts.back()[i];
        }
    }
    return res;
}

// The rows of a one-sequence ubatch that remain when image i keeps counts[i] tokens. Which tokens these are is not known
// yet: cells and mask depend on their number and order only, so the first positions of each image stand in.
static llama_ubatch
shorten(const llama_ubatch & src, const std::vector<st3_span> & spans, const std::vector<uint32_t> & counts) {
    auto data = std::make_shared<llama_ubatch::data_t>();

    data->seq_id_data = { src.seq_id[0][0] };
    data->seq_id_unq  = { src.seq_id_unq, src.seq_id_unq + src.n_seqs_unq };
    data->seq_idx     = { src.seq_idx, src.seq_idx + LLAMA_MAX_SEQ };

    size_t i_span = 0;
    for (uint32_t i = 0; i < src.n_tokens; ++i) {
        while (i_span < spans.size() && i >= spans[i_span].row + spans[i_span].n) {
            i_span++;
        }
        if (i_span < spans.size() && i >= spans[i_span].row + counts[i_span]) {
            continue;
        }
        data->pos.push_back(src.pos[i]);
        data->output.push_back(src.output[i]);
    }

    const uint32_t n = (uint32_t) data->pos.size();
    data->n_seq_id.assign(n, 1);
    data->seq_id.assign(n, data->seq_id_data.data());

    llama_ubatch res = src;
    res.n_tokens     = n;
    res.n_seq_tokens = src.n_seqs == src.n_tokens ? 1 : n;  // of a unified cache each row counts as a sequence
    res.n_seqs       = n / res.n_seq_tokens;
    res.token        = nullptr;
    res.embd         = nullptr;
    res.pos          = data->pos.data();
    res.n_seq_id     = data->n_seq_id.data();
    res.seq_id       = data->seq_id.data();
    res.seq_id_unq   = data->seq_id_unq.data();
    res.seq_idx      = data->seq_idx.data();
    res.output       = data->output.data();
    res.data         = std::move(data);
    return res;
}

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

void st3_memory::synchronize() const {
    if (lctx) {
        lctx->synchronize();
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

ggml_tensor * st3_memory::attn_norm(int32_t il) const { return model.layers[il].attn_norm; }

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

// What a stage holds of an image.
st3_memory::held_t st3_memory::held(llama_seq_id seq_id, const st3_image & image, uint32_t stage) const {
    const auto & cells = stages[stage]->get_cells(seq_id).seq_pos_get(seq_id);

    held_t    res;
    auto      it   = cells.begin();
    llama_pos last = -1;
    for (uint32_t i = 0; i < image.pos.size(); ++i) {
        const llama_pos pos = image.pos[i];
        if (pos < 0) {
            continue;
        }
        if (pos != last + 1) {  // neighbours are as a rule a step away, anything else is looked for
            it = cells.lower_bound({ pos, 0 });
        }
        while (it != cells.end() && it->first < pos) {
            ++it;
        }
        if (it != cells.end() && it->first == pos) {
            res.ids.push_back(i);
            res.cells.push_back(it->second);
        }
        last = pos;
    }
    return res;
}

uint32_t st3_memory::n_held(llama_seq_id seq_id, const st3_image & image, uint32_t stage) const {
    return (uint32_t) held(seq_id, image, stage).ids.size();
}

//
// a batch, before the compute
//

std::unique_ptr<st3_plan> st3_memory::make_plan(const llama_ubatch & ubatch) const {
    const auto & before = images.of(ubatch.seq_id[0][0]);

    auto plan    = std::make_unique<st3_plan>();
    plan->spans  = expected;
    plan->n_text = ubatch.n_tokens - (expected.back().row + expected.back().n);
    plan->number = before.empty() ? 0 : before.back().number + 1;

    for (uint32_t s = 0; s < n_stage(); ++s) {
        std::vector<uint32_t> held;
        for (const auto & span : expected) {
            held.push_back(schedule.counts(span.n)[s]);
        }
        plan->ubatches.push_back(s == 0 ? ubatch : shorten(ubatch, expected, held));
        plan->counts.push_back(std::move(held));
    }
    return plan;
}

// cut: the sequence's waiting images are cut down after this ubatch.
st3_record st3_memory::make_record(const llama_ubatch & ubatch, llama_seq_id seq_id, bool cut) const {
    const auto has_seq = [&](uint32_t row) {
        return std::find(ubatch.seq_id[row], ubatch.seq_id[row] + ubatch.n_seq_id[row], seq_id) !=
               ubatch.seq_id[row] + ubatch.n_seq_id[row];
    };
    st3_record res;
    res.seq_id = seq_id;

    uint32_t end = ubatch.n_tokens;
    while (!has_seq(end - 1)) {
        end--;
    }
    uint32_t begin = end - 1;
    while (begin > 0 && has_seq(begin - 1)) {
        begin--;
    }
    res.n_rows   = std::min(end - begin, MAX_TEXT_ROW);
    res.from_end = ubatch.n_tokens - end;
    if (!unified) {
        const auto * first = std::min_element(ubatch.seq_id_unq, ubatch.seq_id_unq + ubatch.n_seqs_unq);
        res.stream         = seq_id - *first;
    }

    // what every stage holds of the images in question, those that wait for their cuts first
    struct share_t {
        uint32_t            image;
        std::vector<held_t> held;  // [stage]
    };
    const auto &         list = images.of(seq_id);
    std::vector<share_t> shares;
    size_t               n_waiting = 0;
    for (const bool waiting : { true, false }) {
        for (uint32_t i = 0; i < list.size(); ++i) {
            if (list[i].pruned == waiting || (waiting ? !cut : !schedule.anneals())) {
                continue;
            }
            share_t share = { i, {} };
            bool    more  = waiting;  // whether it will lose any more tokens
            for (uint32_t s = 0; s < n_stage(); ++s) {
                share.held.push_back(held(seq_id, list[i], s));
                more |= !waiting && share.held[s].ids.size() > schedule.target(
                                                                       (uint32_t) list[i].pos.size(), list[i].n0[s],
                                                                       std::numeric_limits<uint64_t>::max());
            }
            if (more) {
                shares.push_back(std::move(share));
                n_waiting += waiting;
            }
        }
    }
    res.cut    = n_waiting > 0 && !schedule.terms.empty() && !schedule.cuts.empty();
    res.anneal = !shares.empty() && schedule.anneals() && !schedule.anneal_terms.empty();

    for (uint32_t s = 0; s < n_stage(); ++s) {
        res.cells.emplace_back();
        res.tokens.emplace_back();
        res.n_fresh.push_back(0);

        uint32_t n_ids = 0;
        for (size_t i = 0; i < shares.size() && (res.anneal || i < n_waiting); ++i) {
            const auto & h = shares[i].held[s];
            res.cells[s].insert(res.cells[s].end(), h.cells.begin(), h.cells.end());
            for (const uint32_t id : h.ids) {
                res.tokens[s].push_back({ shares[i].image, id });
            }
            res.n_fresh[s] += i < n_waiting ? (uint32_t) h.ids.size() : 0;
            // what is held falls and n0 does not, so that graphs can be used again; n0 may come from a saved state
            n_ids += (uint32_t) std::max<size_t>(h.ids.size(), i < n_waiting ? 0 : list[shares[i].image].n0[s]);
        }
        res.n_ids.push_back(GGML_PAD(n_ids, PAD_IDS));
    }
    return res;
}

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

// Frees what is due at the start of a generated token's decode, so that the token can take a freed cell.
void st3_memory::anneal(llama_seq_id seq_id) {
    for (const auto & image : images.of(seq_id)) {
        if (!image.pruned || image.n_steps % schedule.anneal_interval != 0) {
            continue;
        }
        for (uint32_t s = 0; s < n_stage(); ++s) {
            const uint32_t n_keep =
                    schedule.target((uint32_t) image.pos.size(), image.n0[s], image.n_steps + schedule.anneal_interval);

            auto ids = held(seq_id, image, s).ids;
            if (ids.size() <= n_keep) {
                continue;
            }
            absorb();

            auto rank = schedule.bias(image.nx, image.ny, n_keep, image.number, schedule.anneal_random);
            if (!image.scores.empty()) {
                for (size_t i = 0; i < rank.size(); ++i) {
                    rank[i] += image.scores[s][i] / image.n_records;
                }
            }
            // lowest first; of equals the higher index
            std::sort(ids.begin(), ids.end(), [&](uint32_t a, uint32_t b) {
                return rank[a] != rank[b] ? rank[a] < rank[b] : a > b;
            });
            ids.resize(ids.size() - n_keep);
            drop(seq_id, image, s, ids);
        }
    }
}

void st3_memory::drop(llama_seq_id seq_id, const st3_image & image, uint32_t stage, const std::vector<uint32_t> & ids) {
    for (const uint32_t i : ids) {
        stages[stage]->remove(seq_id, image.pos[i]);
    }
}

llama_memory_context_ptr st3_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    const auto failed = [] { return std::make_unique<st3_memory_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE); };

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        // a pruned prompt is one ubatch, however long
        const uint32_t n_max  = expected.empty() ? n_ubatch : balloc.get_n_tokens();
        auto           ubatch = unified ? balloc.split_simple(n_max) : balloc.split_equal(n_max, true, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch));
    }
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return failed();
    }

    std::unique_ptr<st3_plan> plan;
    if (!expected.empty()) {
        GGML_ASSERT(ubatches.size() == 1 && "a pruned prompt is one ubatch");
        plan = make_plan(ubatches[0]);
    }

    struct share_t {
        uint32_t n      = 0;
        size_t   last   = 0;  // ubatch
        bool     output = false;
    };
    std::map<llama_seq_id, share_t> shares;  // of the batch, a sequence each
    for (size_t u = 0; u < ubatches.size(); ++u) {
        for (uint32_t i = 0; i < ubatches[u].n_tokens; ++i) {
            for (int32_t j = 0; j < ubatches[u].n_seq_id[i]; ++j) {
                auto & share = shares[ubatches[u].seq_id[i][j]];
                share.n++;
                share.last = u;
                share.output |= ubatches[u].output[i] != 0;
            }
        }
    }
    const bool text = !plan && !ubatches[0].embd;

    if (text) {
        for (const auto & [seq_id, share] : shares) {
            if (share.n == 1 && share.output) {
                anneal(seq_id);
            }
        }
    }
    if (!fit(ubatches, plan.get())) {
        return failed();
    }

    std::vector<llama_kv_cache::slot_info_vec_t> slots;
    for (uint32_t s = 0; s < n_stage(); ++s) {
        slots.push_back(stages[s]->prepare(plan ? std::vector<llama_ubatch>{ plan->ubatches[s] } : ubatches));
        if (slots.back().empty()) {
            return failed();
        }
    }

    std::vector<st3_work> works(ubatches.size());
    for (const auto & [seq_id, share] : shares) {
        auto &       work = works[share.last];
        const auto & list = images.of(seq_id);

        if (text && share.n == 1 && share.output) {
            work.steps.push_back(seq_id);
        }
        const bool cut = text && share.output &&
                         std::any_of(list.begin(), list.end(), [](const st3_image & image) { return !image.pruned; });
        if (cut) {
            work.questions.push_back(seq_id);
        }
        if (text && !list.empty()) {
            auto record = make_record(ubatches[share.last], seq_id, cut);
            if (record.anneal || record.cut) {
                work.records.push_back(std::move(record));
            }
        }
        if (plan) {
            auto record   = make_record(ubatches[0], seq_id, false);
            record.n_rows = std::clamp(plan->n_text, 1u, MAX_TEXT_ROW);
            record.anneal = schedule.anneals() && !schedule.anneal_terms.empty();
            for (uint32_t s = 0; s < n_stage(); ++s) {
                std::vector<uint32_t> fresh;
                for (size_t i = 0; i < plan->spans.size(); ++i) {
                    const auto first = slots[s][0].idxs[0].begin() + plan->row(s, i);
                    fresh.insert(fresh.end(), first, first + plan->counts[s][i]);
                }
                record.n_fresh[s] = (uint32_t) fresh.size();
                record.cells[s].insert(record.cells[s].begin(), fresh.begin(), fresh.end());
                record.n_ids[s] = (uint32_t) record.cells[s].size();
            }
            work.records.push_back(std::move(record));
        }
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

llama_memory_context_ptr st3_memory::init_update(llama_context * lctx_, bool optimize) {
    lctx = lctx_;

    std::vector<llama_memory_context_ptr> ctxs;
    for (auto & stage : stages) {
        ctxs.push_back(stage->init_update(lctx, optimize));
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
        add_images(ubatch);
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

// Embeddings that are announced as an image, as many as are still to come.
void st3_memory::add_images(const llama_ubatch & ubatch) {
    auto & announced = waits.announced;

    const uint32_t n = std::min(ubatch.n_tokens / ubatch.n_seqs_unq, announced.left);
    if (n == 0) {
        return;
    }
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[s];
        const auto *       first  = std::find_if(
                       ubatch.seq_id, ubatch.seq_id + ubatch.n_tokens, [=](const auto * ids) { return *ids == seq_id; });
        if (first == ubatch.seq_id + ubatch.n_tokens) {
            continue;  // it shares another's rows
        }
        const auto & list            = images.of(seq_id);
        const bool   more            = !announced.begins() && !list.empty() && !list.back().pruned;
        auto &       image           = images.add(seq_id, ubatch.pos[first - ubatch.seq_id], n, more);
        std::tie(image.nx, image.ny) = announced.grid((uint32_t) image.pos.size());
    }
    announced.left -= n;
}

// Counts what a ubatch computed.
void st3_memory::take_account(const llama_ubatch & ubatch, const st3_work & work, const st3_plan * plan) {
    for (uint32_t i = 0; i < ubatch.n_seqs_unq; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[i];
        auto &             a      = accounts[seq_id];

        uint32_t n      = 0;
        bool     output = false;
        for (uint32_t row = 0; row < ubatch.n_tokens; ++row) {
            const auto * ids = ubatch.seq_id[row];
            if (std::find(ids, ids + ubatch.n_seq_id[row], seq_id) != ids + ubatch.n_seq_id[row]) {
                n++;
                output |= ubatch.output[row] != 0;
            }
        }
        if (!a.open && std::count(work.steps.begin(), work.steps.end(), seq_id) > 0) {
            continue;  // a generated token
        }
        if (!a.open) {
            a.n_rows     = 0;
            a.pairs_full = 0;
            a.rows.assign(n_stage(), 0);
            a.pairs.assign(n_stage(), 0);
            if (!plan) {
                a.kept.clear();
                a.owners.clear();
            }
        }
        const auto pairs = [](double n_rows, double n_before) { return n_rows * n_before + n_rows * (n_rows + 1) / 2; };

        a.n_rows += n;
        a.pairs_full += pairs(n, seq_pos_max(seq_id) + 1 - n);
        for (uint32_t s = 0; s < n_stage(); ++s) {
            const uint32_t n_rows = plan ? plan->n_rows(s) : n;
            const auto     n_held = (uint32_t) stages[s]->get_cells(seq_id).seq_pos_get(seq_id).size();
            a.rows[s] += n_rows;
            a.pairs[s] += pairs(n_rows, n_held - std::min(n_held, n_rows));
        }
        a.open   = !output;
        last_seq = seq_id;
    }
}

// Writes the positions of the tokens that survived into the cells that hold them, and remembers the images.
void st3_memory::commit(const st3_plan & plan, const std::vector<llama_kv_cache::slot_info> & slots, st3_work & work) {
    synchronize();

    const auto & first  = plan.ubatches[0];
    const auto   seq_id = first.seq_id[0][0];
    auto &       list   = images.of(seq_id);
    const auto   i_new  = (uint32_t) list.size();

    for (size_t i = 0; i < plan.spans.size(); ++i) {
        auto & image = images.add(seq_id, first.pos[plan.spans[i].row], plan.spans[i].n, false);
        image.nx     = plan.spans[i].nx;
        image.ny     = plan.spans[i].ny;
        image.number = plan.number + (uint32_t) i;
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

            const llama_pos p0  = first.pos[plan.spans[i].row];
            const uint32_t  row = plan.row(s, i);

            // all of them leave before any returns: a stand-in position may be another token's real one
            for (size_t j = 0; j < ids.size(); ++j) {
                cells.rm(slots[s].idxs[0][row + j]);
            }
            for (size_t j = 0; j < ids.size(); ++j) {
                const uint32_t cell = slots[s].idxs[0][row + j];
                cells.pos_set(cell, p0 + ids[j]);
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

// Has a ubatch's scores brought to the host, and does not wait for them.
void st3_memory::collect(std::vector<st3_record> records, ggml_tensor * out, ggml_backend_sched_t sched) {
    const size_t n_bytes = ggml_nbytes(out);

    ggml_backend_buffer_ptr buf;
    const auto              fits = [=](const auto & b) { return ggml_backend_buffer_get_size(b.get()) >= n_bytes; };
    if (const auto it = std::find_if(spare.begin(), spare.end(), fits); it != spare.end()) {
        buf = std::move(*it);
        spare.erase(it);
    } else {
        spare.clear();  // too small by now, all of them
        // a copy from a device waits for it unless the host's memory is pinned
        const auto dev  = model.dev_output();
        const auto buft = dev ? ggml_backend_dev_host_buffer_type(dev) : nullptr;
        buf.reset(ggml_backend_buft_alloc_buffer(buft ? buft : ggml_backend_cpu_buffer_type(), n_bytes));
        if (!buf) {  // nobody above llama_decode would catch an exception; ranks go by what other steps recorded
            LLAMA_LOG_WARN("%s: no memory for the scores of a step\n", __func__);
            return;
        }
    }
    ggml_backend_tensor_get_async(
            ggml_backend_sched_get_tensor_backend(sched, out), out, ggml_backend_buffer_get_base(buf.get()), 0,
            n_bytes);
    pending.push_back({ std::move(records), std::move(buf), (size_t) ggml_nelements(out) });

    if (pending.size() >= 64) {
        absorb();
    }
}

// Adds the scores that are on their way to the images'. The order of them is st3_record()'s in st3-graph.cpp.
void st3_memory::absorb() {
    if (pending.empty()) {
        return;
    }
    synchronize();

    for (auto & p : pending) {
        const float * data = (const float *) ggml_backend_buffer_get_base(p.buf.get());
        const float * end  = data + p.n;

        for (uint32_t s = 0; s < n_stage(); ++s) {
            for (const auto & record : p.records) {
                if (record.n_ids[s] == 0) {
                    continue;
                }
                if (record.anneal) {
                    for (size_t i = 0; i < record.tokens[s].size(); ++i) {
                        const auto [i_image, index] = record.tokens[s][i];

                        auto & image = images.of(record.seq_id)[i_image];
                        if (image.scores.empty()) {
                            image.scores.assign(n_stage(), std::vector<float>(image.pos.size()));
                        }
                        image.scores[s][index] += std::isfinite(data[i]) ? data[i] : 0.0f;  // NaN has no rank
                    }
                    data += record.n_ids[s];
                }
                if (record.cut && s < schedule.cuts.size()) {
                    auto & cut = cut_scores[record.seq_id];
                    cut.tokens.assign(record.tokens[s].begin(), record.tokens[s].begin() + record.n_fresh[s]);
                    cut.scores.emplace_back();
                    for (uint32_t i = 0; i < record.n_fresh[s]; ++i) {
                        cut.scores.back().push_back(std::isfinite(data[i]) ? data[i] : 0.0f);
                    }
                    data += record.n_fresh[s];
                }
            }
        }
        GGML_ASSERT(data == end);

        for (const auto & record : p.records) {
            if (record.anneal) {
                std::vector<bool> seen(images.of(record.seq_id).size());
                for (const auto & tokens : record.tokens) {
                    for (const auto & token : tokens) {
                        seen[token.image] = true;
                    }
                }
                for (size_t i = 0; i < seen.size(); ++i) {
                    images.of(record.seq_id)[i].n_records += seen[i];
                }
            }
        }
        spare.push_back(std::move(p.buf));
    }
    pending.clear();
}

// The place among `kept` of the owner of each of an image's tokens `ids`, as st3_owners::cut takes it. The rows of the residual
// stream are gone; the values that a stage's first layer made of them, which carry no position, are compared instead.
std::vector<int32_t> st3_memory::nearest(
        llama_seq_id seq_id, uint32_t stage, const held_t & there, const std::vector<uint32_t> & ids,
        const std::vector<uint32_t> & kept) const {
    if (kept.empty() || kept.size() == ids.size()) {
        return {};
    }
    std::vector<uint32_t> cells, rows;
    for (size_t i = 0; i < there.ids.size(); ++i) {
        if (std::binary_search(ids.begin(), ids.end(), there.ids[i])) {
            if (std::binary_search(kept.begin(), kept.end(), there.ids[i])) {
                rows.push_back((uint32_t) cells.size());
            }
            cells.push_back(there.cells[i]);
        }
    }
    synchronize();
    auto         values = stages[stage]->values(stages[stage]->get_stream(seq_id), cells);
    const size_t width  = values.size() / cells.size();
    return st3_nearest(std::move(values), width, rows);
}

// Cuts down the images of a sequence that wait for it, as the cuts of a pruned prefill would.
void st3_memory::evict(llama_seq_id seq_id) {
    absorb();

    const auto cut = std::move(cut_scores[seq_id]);
    cut_scores.erase(seq_id);

    auto & list = images.of(seq_id);
    for (uint32_t i_image = 0; i_image < list.size(); ++i_image) {
        auto & image = list[i_image];
        if (image.pruned) {
            continue;
        }
        const auto n_keep = schedule.counts((uint32_t) image.pos.size());

        auto ids = held(seq_id, image, 0).ids;
        image.n0 = { (uint32_t) ids.size() };

        st3_owners stand_in((uint32_t) image.pos.size(), { ids.begin(), ids.end() });
        if (schedule.merge) {
            image.weights = { stand_in.weights() };
        }
        for (uint32_t s = 1; s < n_stage(); ++s) {
            auto rank = schedule.bias(image.nx, image.ny, n_keep[s], image.number, schedule.random);
            for (size_t i = 0; i < cut.tokens.size(); ++i) {
                if (cut.tokens[i].image == i_image) {
                    rank[cut.tokens[i].index] += cut.scores[s - 1][i];
                }
            }
            // highest first; of equals the lower index
            std::sort(ids.begin(), ids.end(), [&](uint32_t a, uint32_t b) {
                return rank[a] != rank[b] ? rank[a] > rank[b] : a < b;
            });
            auto was = ids;
            std::sort(was.begin(), was.end());
            ids.resize(std::min<size_t>(ids.size(), n_keep[s]));
            std::sort(ids.begin(), ids.end());

            const auto before = held(seq_id, image, s);
            if (schedule.merge) {
                stand_in.cut({ ids.begin(), ids.end() }, nearest(seq_id, s, before, was, ids));
                image.weights.push_back(stand_in.weights());
            }
            std::vector<uint32_t> gone;
            std::set_difference(before.ids.begin(), before.ids.end(), ids.begin(), ids.end(), std::back_inserter(gone));
            drop(seq_id, image, s, gone);
            image.n0.push_back((uint32_t) ids.size());
        }
        image.pruned  = true;
        image.evicted = true;
    }
}

void st3_memory::trim() {
    synchronize();
    for (auto & s : stages) {
        s->fit(s->n_used_max());
    }
}

//
// sequences
//

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
    if (!(whole && empty)) {
        for (const auto id : { seq_id_src, seq_id_dst }) {
            if (st3_decode_waiting(*lctx, id) != 0) {
                LLAMA_LOG_ERROR(
                        "%s: what waits in sequence %d could not be computed: nothing is copied\n", __func__, id);
                return;
            }
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
    return prompt && (res < 0 || prompt->p0 < res) ? prompt->p0 : res;
}

llama_pos st3_memory::seq_pos_max(llama_seq_id seq_id) const {
    llama_pos res = images.pos_max(seq_id);
    for (const auto & s : stages) {
        res = std::max(res, s->seq_pos_max(seq_id));
    }
    const auto * prompt = waits.of(seq_id);
    return prompt ? std::max(res, prompt->end() - 1) : res;
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

//
// st3_memory_context
//

st3_memory_context::st3_memory_context(st3_memory * mem, std::vector<llama_memory_context_ptr> stages) :
    status(LLAMA_MEMORY_STATUS_NO_UPDATE),
    mem(mem),
    stages(std::move(stages)) {
    for (const auto & s : this->stages) {
        status = llama_memory_status_combine(status, s->get_status());
    }
}

st3_memory_context::st3_memory_context(
        st3_memory * mem, std::vector<llama_kv_cache::slot_info_vec_t> slots_, std::vector<llama_ubatch> ubatches_,
        std::vector<st3_work> works_, std::unique_ptr<st3_plan> plan) :
    status(LLAMA_MEMORY_STATUS_SUCCESS),
    mem(mem),
    slots(std::move(slots_)),
    ubatches(std::move(ubatches_)),
    works(std::move(works_)),
    plan_(std::move(plan)) {
    for (uint32_t s = 0; s < slots.size(); ++s) {
        stages.push_back(std::make_unique<llama_kv_cache_context>(
                &mem->stage(s), slots[s], plan_ ? std::vector<llama_ubatch>{ plan_->ubatches[s] } : ubatches));
    }
}

const std::vector<st3_record> & st3_memory_context::records() const {
    static const std::vector<st3_record> none;

    return i_cur < works.size() ? works[i_cur].records : none;
}

void st3_memory_context::add_weights(uint32_t stage, const llama_ubatch & ubatch, ggml_tensor * mask) const {
    const int64_t n_kv = mask->ne[0];

    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[s];
        mem->each_weight(seq_id, stage, [&](uint32_t cell, float weight) {
            const float bias = std::log(weight);
            for (uint32_t row = 0; row < ubatch.n_tokens; ++row) {
                if (ubatch.seq_id[row][0] != seq_id) {  // which the mask is written for
                    continue;
                }
                const size_t at = row * n_kv + cell;
                if (mask->type == GGML_TYPE_F16) {
                    auto & x = ((ggml_fp16_t *) mask->data)[at];
                    x        = ggml_fp32_to_fp16(ggml_fp16_to_fp32(x) + bias);
                } else {
                    ((float *) mask->data)[at] += bias;
                }
            }
        });
    }
}

bool st3_memory_context::next() {
    std::vector<llama_kv_cache::slot_info> cur;
    for (const auto & s : slots) {
        cur.push_back(s[i_cur]);
    }
    mem->finish(ubatches[i_cur], works[i_cur], plan_.get(), cur, out_, sched_);
    out_ = nullptr;

    for (auto & s : stages) {
        s->next();
    }
    if (++i_cur < ubatches.size()) {
        return true;
    }
    // not before: the cells of every ubatch were chosen when the batch began
    if (std::any_of(works.begin(), works.end(), [](const st3_work & work) { return !work.questions.empty(); })) {
        mem->trim();
    }
    return false;
}

bool st3_memory_context::apply() {
    bool res = true;
    for (auto & s : stages) {
        // an update context with nothing to do must not be applied
        if (s->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
            res = s->apply() && res;
        }
    }
    return res;
}

//
// call sites
//

void st3_merge_overrides(
        const std::unordered_map<std::string, llama_model_kv_override> & overrides,
        std::unordered_map<std::string, std::string> &                   meta) {
    for (const auto & [key, o] : overrides) {
        if (key.rfind("st3.", 0) != 0) {
            continue;
        }
        switch (o.tag) {
            case LLAMA_KV_OVERRIDE_TYPE_INT: meta[key] = format("%lld", (long long) o.val_i64); break;
            case LLAMA_KV_OVERRIDE_TYPE_FLOAT: meta[key] = format("%.17g", o.val_f64); break;
            case LLAMA_KV_OVERRIDE_TYPE_BOOL: meta[key] = o.val_bool ? "true" : "false"; break;
            case LLAMA_KV_OVERRIDE_TYPE_STR: meta[key] = o.val_str; break;
        }
    }
}

std::string st3_unsupported(const llama_model & model, const llama_memory_params * params) {
    if (model.arch != LLM_ARCH_LLAMA) {
        return format("architecture %s is not supported yet (llama is)", model.arch_name().c_str());
    }
    if (model.hparams.is_swa_any()) {
        return "models with sliding-window attention are not supported yet";
    }
    if (model.hparams.f_max_alibi_bias > 0.0f || model.hparams.attn_soft_cap) {
        return "models with ALiBi or attention soft-capping are not supported yet";
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return "tensors split over several devices (split mode tensor) are not supported yet";
    }
    if (params && (params->ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || params->mem_other)) {
        return "draft and multi-token-prediction contexts are not supported";
    }
    return "";
}

llama_memory_i *
st3_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    st3_schedule schedule = st3_make_schedule(model.gguf_kv, model.hparams.n_layer());
    if (schedule.off()) {
        return nullptr;
    }
    const std::string why = st3_unsupported(model, &params);
    if (!why.empty()) {
        LLAMA_LOG_WARN("%s: ST3 is off: %s\n", __func__, why.c_str());
        return nullptr;
    }
    LLAMA_LOG_INFO(
            "%s: preset %s, %zu cuts, keep %.3f, annealing %s\n", __func__, schedule.preset.c_str(),
            schedule.cuts.size(), schedule.keep, schedule.curve_name());

    return new st3_memory(model, params, cparams, std::move(schedule));
}
