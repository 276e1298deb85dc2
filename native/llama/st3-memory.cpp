#include "st3-memory.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

//
// st3_plan
//

uint32_t st3_plan::row(uint32_t stage, size_t image) const {
    uint32_t res = images[image].row;
    for (size_t i = 0; i < image; ++i) {
        res -= images[i].n - counts[stage][i];
    }
    return res;
}

uint32_t st3_plan::n_visual(uint32_t stage) const {
    return std::accumulate(counts[stage].begin(), counts[stage].end(), 0u);
}

uint32_t st3_plan::last_row(uint32_t row) const {
    uint32_t res = row;
    for (size_t i = 0; i < images.size(); ++i) {
        if (images[i].row < row) {
            res -= images[i].n - counts.back()[i];
        }
    }
    return res;
}

// The rows of a one-sequence ubatch that remain when image i keeps counts[i] tokens. Which tokens these are is not known
// yet: cells and mask depend on their number and order only, so the first positions of each image stand in.
static llama_ubatch
shorten(const llama_ubatch & src, const std::vector<st3_image> & images, const std::vector<uint32_t> & counts) {
    auto data = std::make_shared<llama_ubatch::data_t>();

    data->seq_id_data = { src.seq_id[0][0] };
    data->seq_id_unq  = { src.seq_id_unq, src.seq_id_unq + src.n_seqs_unq };
    data->seq_idx     = { src.seq_idx, src.seq_idx + LLAMA_MAX_SEQ };

    size_t i_image = 0;
    for (uint32_t i = 0; i < src.n_tokens; ++i) {
        while (i_image < images.size() && i >= images[i_image].row + images[i_image].n) {
            i_image++;
        }
        if (i_image < images.size() && i >= images[i_image].row + counts[i_image] && i >= images[i_image].row) {
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
    res.n_seq_tokens = n / src.n_seqs;
    res.n_seqs       = src.n_seqs;
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
    unified(cparams.kv_unified) {
    for (uint32_t i = 0; i <= schedule.cuts.size(); ++i) {
        stages.push_back(std::make_unique<llama_kv_cache>(
                model, model.hparams, params.type_k, params.type_v, !cparams.flash_attn, cparams.offload_kqv, unified,
                cparams.n_ctx_seq, cparams.n_seq_max, 1, 0, LLAMA_SWA_TYPE_NONE, nullptr,
                [&](int32_t il) { return schedule.stage(il) == i; }, nullptr, nullptr));
    }
}

std::unique_ptr<st3_plan> st3_memory::make_plan(const llama_ubatch & ubatch) const {
    auto plan    = std::make_unique<st3_plan>();
    plan->images = expected;
    plan->n_text = ubatch.n_tokens - (expected.back().row + expected.back().n);

    for (uint32_t s = 0; s < n_stage(); ++s) {
        std::vector<uint32_t> held;
        for (const auto & image : expected) {
            held.push_back(schedule.counts(image.n)[s]);
        }
        plan->ubatches.push_back(s == 0 ? ubatch : shorten(ubatch, expected, held));
        plan->counts.push_back(std::move(held));
    }
    return plan;
}

llama_memory_context_ptr st3_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = unified ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch));
    }
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return std::make_unique<st3_memory_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    std::unique_ptr<st3_plan> plan;
    if (!expected.empty()) {
        GGML_ASSERT(ubatches.size() == 1 && "a pruned prompt is one ubatch");
        plan = make_plan(ubatches[0]);
    }

    std::vector<llama_kv_cache::slot_info_vec_t> slots;
    for (uint32_t s = 0; s < n_stage(); ++s) {
        slots.push_back(stages[s]->prepare(plan ? std::vector<llama_ubatch>{ plan->ubatches[s] } : ubatches));
        if (slots.back().empty()) {
            return std::make_unique<st3_memory_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }
    }
    return std::make_unique<st3_memory_context>(this, std::move(slots), std::move(ubatches), std::move(plan));
}

llama_memory_context_ptr st3_memory::init_full() {
    std::vector<llama_memory_context_ptr> ctxs;
    for (auto & stage : stages) {
        ctxs.push_back(stage->init_full());
    }
    return std::make_unique<st3_memory_context>(this, std::move(ctxs));
}

llama_memory_context_ptr st3_memory::init_update(llama_context * lctx, bool optimize) {
    std::vector<llama_memory_context_ptr> ctxs;
    for (auto & stage : stages) {
        ctxs.push_back(stage->init_update(lctx, optimize));
    }
    return std::make_unique<st3_memory_context>(this, std::move(ctxs));
}

void st3_memory::commit(const st3_plan & plan, const std::vector<llama_kv_cache::slot_info> & slots) {
    ggml_backend_sched_synchronize(plan.sched);

    kept.assign(plan.n_stage() - 1, {});

    for (uint32_t s = 1; s < plan.n_stage(); ++s) {
        const auto & ubatch = plan.ubatches[s];
        const auto   seq_id = ubatch.seq_id[0][0];
        const auto & cells_ = stages[s]->get_cells(seq_id);
        auto &       cells  = const_cast<llama_kv_cells &>(cells_);  // upstream has no writable accessor

        int32_t i_first = 0;  // index over all images of the image's first token
        for (size_t i = 0; i < plan.images.size(); ++i) {
            std::vector<int32_t> ids(plan.counts[s][i]);
            std::iota(ids.begin(), ids.end(), 0);
            if (plan.kept[s - 1][i]) {
                ggml_backend_tensor_get(plan.kept[s - 1][i], ids.data(), 0, ids.size() * sizeof(int32_t));
            }

            const llama_pos p0  = plan.ubatches[0].pos[plan.images[i].row];
            const uint32_t  row = plan.row(s, i);

            // all of them leave before any returns: a stand-in position may be another token's real one
            for (size_t j = 0; j < ids.size(); ++j) {
                cells.rm(slots[s].idxs[0][row + j]);
            }
            for (size_t j = 0; j < ids.size(); ++j) {
                const uint32_t cell = slots[s].idxs[0][row + j];
                cells.pos_set(cell, p0 + ids[j]);
                cells.seq_add(cell, seq_id);
                kept[s - 1].push_back(i_first + ids[j]);
            }
            i_first += (int32_t) plan.images[i].n;
        }
    }
}

bool st3_memory::get_can_shift() const {
    return std::all_of(stages.begin(), stages.end(), [](const auto & s) { return s->get_can_shift(); });
}

void st3_memory::clear(bool data) {
    for (auto & s : stages) {
        s->clear(data);
    }
}

bool st3_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    bool res = true;
    for (auto & s : stages) {
        res = s->seq_rm(seq_id, p0, p1) && res;
    }
    return res;
}

void st3_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    for (auto & s : stages) {
        s->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    }
}

void st3_memory::seq_keep(llama_seq_id seq_id) {
    for (auto & s : stages) {
        s->seq_keep(seq_id);
    }
}

void st3_memory::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    for (auto & s : stages) {
        s->seq_add(seq_id, p0, p1, shift);
    }
}

void st3_memory::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    for (auto & s : stages) {
        s->seq_div(seq_id, p0, p1, d);
    }
}

// the first stage holds every position
llama_pos st3_memory::seq_pos_min(llama_seq_id seq_id) const { return stages[0]->seq_pos_min(seq_id); }

llama_pos st3_memory::seq_pos_max(llama_seq_id seq_id) const { return stages[0]->seq_pos_max(seq_id); }

std::map<ggml_backend_buffer_type_t, size_t> st3_memory::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & s : stages) {
        for (const auto & [buft, size] : s->memory_breakdown()) {
            res[buft] += size;
        }
    }
    return res;
}

void st3_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    for (const auto & s : stages) {
        s->state_write(io, seq_id, flags);
    }
}

void st3_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    try {
        for (auto & s : stages) {
            s->state_read(io, seq_id, flags);
        }
    } catch (...) {
        // the stages would disagree about what the sequence holds
        for (auto & s : stages) {
            s->state_clear(seq_id);
        }
        throw;
    }
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
        std::unique_ptr<st3_plan> plan) :
    status(LLAMA_MEMORY_STATUS_SUCCESS),
    mem(mem),
    slots(std::move(slots_)),
    ubatches(std::move(ubatches_)),
    plan_(std::move(plan)) {
    for (uint32_t s = 0; s < slots.size(); ++s) {
        stages.push_back(std::make_unique<llama_kv_cache_context>(
                &mem->stage(s), slots[s], plan_ ? std::vector<llama_ubatch>{ plan_->ubatches[s] } : ubatches));
    }
}

bool st3_memory_context::next() {
    if (plan_) {
        std::vector<llama_kv_cache::slot_info> cur;
        for (const auto & s : slots) {
            cur.push_back(s[i_cur]);
        }
        mem->commit(*plan_, cur);
    }
    for (auto & s : stages) {
        s->next();
    }
    return ++i_cur < ubatches.size();
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
            "%s: preset %s, %zu cuts, keep %.3f\n", __func__, schedule.preset.c_str(), schedule.cuts.size(),
            schedule.keep);

    return new st3_memory(model, params, cparams, std::move(schedule));
}
