// st3-memory.h - KV memory of a pruned model: one llama_kv_cache for each stage (the layers between two cuts).
#pragma once

#include "llama-batch.h"
#include "llama-kv-cache.h"
#include "llama-memory.h"
#include "st3-schedule.h"

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_cparams;
struct llama_model_kv_override;

// One image in a prompt: rows [row, row + n) of the batch.
struct st3_image {
    uint32_t row;
    uint32_t n;
    uint32_t nx;
    uint32_t ny;
};

// What a pruned prefill does, known in full before the compute but for which tokens survive.
struct st3_plan {
    std::vector<st3_image>             images;
    std::vector<std::vector<uint32_t>> counts;      // [stage][image] visual tokens held
    std::vector<llama_ubatch>          ubatches;    // [stage] the rows that the stage computes
    uint32_t                           n_text = 0;  // rows after the last image

    // Set by the graph, read after compute: [cut][image] original indices kept, I32 [counts[cut + 1][image]]; null: all.
    std::vector<std::vector<ggml_tensor *>> kept;
    ggml_backend_sched_t                    sched = nullptr;

    uint32_t n_stage() const { return (uint32_t) ubatches.size(); }

    uint32_t n_rows(uint32_t stage) const { return ubatches[stage].n_tokens; }

    // First row of an image in a stage.
    uint32_t row(uint32_t stage, size_t image) const;

    // Visual tokens of all images in a stage.
    uint32_t n_visual(uint32_t stage) const;

    // Row in the last stage of a text row of the batch.
    uint32_t last_row(uint32_t row) const;
};

// The indices kept after each cut, over all images in order.
using st3_kept_t = std::vector<std::vector<int32_t>>;

class st3_memory : public llama_memory_i {
  public:
    st3_memory(
            const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
            st3_schedule schedule);

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    // The next batch is a prompt with these images, to be pruned; cleared with {} afterwards, whatever came of it.
    void expect(std::vector<st3_image> images) { expected = std::move(images); }

    // Writes the positions of the tokens that survived a plan into the cells that hold them.
    void commit(const st3_plan & plan, const std::vector<llama_kv_cache::slot_info> & slots);

    const st3_kept_t & last_kept() const { return kept; }

    const llama_kv_cache & stage(uint32_t i) const { return *stages[i]; }

    llama_kv_cache & stage(uint32_t i) { return *stages[i]; }

    uint32_t n_stage() const { return (uint32_t) stages.size(); }

    const st3_schedule schedule;

  private:
    std::unique_ptr<st3_plan> make_plan(const llama_ubatch & ubatch) const;

    const bool unified;

    std::vector<std::unique_ptr<llama_kv_cache>> stages;
    std::vector<st3_image>                       expected;
    st3_kept_t                                   kept;
};

class st3_memory_context : public llama_memory_context_i {
  public:
    explicit st3_memory_context(llama_memory_status status) : status(status) {}

    // a full cache, or an update of it
    st3_memory_context(st3_memory * mem, std::vector<llama_memory_context_ptr> stages);

    // a batch; slots[stage][ubatch]; plan, if any, is for the only ubatch
    st3_memory_context(
            st3_memory * mem, std::vector<llama_kv_cache::slot_info_vec_t> slots, std::vector<llama_ubatch> ubatches,
            std::unique_ptr<st3_plan> plan);

    bool next() override;
    bool apply() override;

    llama_memory_status  get_status() const override { return status; }
    const llama_ubatch & get_ubatch() const override { return ubatches[i_cur]; }

    const llama_kv_cache_context * stage(uint32_t i) const {
        return static_cast<llama_kv_cache_context *>(stages[i].get());
    }

    uint32_t n_stage() const { return (uint32_t) stages.size(); }

    // Cells of the current ubatch's rows in a stage.
    const llama_kv_cache::slot_info & slot(uint32_t i) const { return slots[i][i_cur]; }

    const st3_schedule & schedule() const { return mem->schedule; }

    st3_plan * plan() const { return plan_.get(); }

  private:
    llama_memory_status status;

    st3_memory * mem = nullptr;

    std::vector<llama_memory_context_ptr>        stages;
    std::vector<llama_kv_cache::slot_info_vec_t> slots;
    std::vector<llama_ubatch>                    ubatches;
    std::unique_ptr<st3_plan>                    plan_;

    size_t i_cur = 0;
};

// Call site in llama_model::load_hparams: st3.* overrides join the metadata, where llama_model_meta_val_str sees them too.
void st3_merge_overrides(
        const std::unordered_map<std::string, llama_model_kv_override> & overrides,
        std::unordered_map<std::string, std::string> &                   meta);

// Call site in llama_model::create_memory: the memory of a model with a schedule, or null for the stock one.
// Throws std::invalid_argument when the st3.* metadata is unusable.
llama_memory_i *
st3_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// Why ST3 cannot run on a model or context although its metadata asks for it; "" if it can.
std::string st3_unsupported(const llama_model & model, const llama_memory_params * params);
