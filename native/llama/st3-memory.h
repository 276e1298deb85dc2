// st3-memory.h - KV memory of a pruned model: one cache for each stage (the layers between two cuts), and what is done to
// the visual tokens in it: cut between layers, cut down after the compute, annealed while the answer grows.
#pragma once

#include "llama-batch.h"
#include "llama-memory.h"
#include "st3-account.h"
#include "st3-images.h"
#include "st3-kv.h"
#include "st3-plan.h"
#include "st3-prompt.h"
#include "st3-schedule.h"
#include "st3-scores.h"

#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_layer;

// What comes with a ubatch besides its computation.
struct st3_work {
    std::vector<st3_record>   records;
    std::vector<llama_seq_id> steps;      // sequences that grow by one generated token
    std::vector<llama_seq_id> questions;  // sequences whose waiting images are cut down now

    // Tokens of the announced image.
    struct part_t {
        bool                   begins = false;
        std::vector<st3_place> places;
    };

    std::map<llama_seq_id, part_t> image;
    uint32_t                       image_left = 0;  // of st3_announced, after it
};

class st3_memory : public llama_memory_i {
  public:
    st3_memory(
            const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
            st3_schedule schedule);

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * ctx, bool optimize) override;

    // Dropped tokens have no keys to turn, so positions stay as they are.
    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // A prompt that loses a part of its question waits again. What waits is computed first where its middle is to go; false,
    // with nothing done, if it cannot be.
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    // Of a part, what waits is computed first; between streams (kv_unified off) whole sequences only. What cannot be is refused
    // with a line in the log.
    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    // Refused with a line in the log, as get_can_shift() says.
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    // Positions count whether their tokens were dropped, wait or are held.
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // One versioned section with a checksum (st3-snapshot.cpp). A bad one throws before anything is touched.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    // The next batch is a prompt with these images, to be pruned; cleared with {} afterwards, whatever came of it.
    void expect(std::vector<st3_span> spans) { expected = std::move(spans); }

    // Whether a sequence has an image that was computed and is not cut down yet.
    bool has_unpruned(llama_seq_id seq_id) const;

    // Has graphs made with room for a prompt of so many images and rows. Returns whether that is more room than before.
    bool make_room_in_graph(uint32_t n_images, uint32_t n_rows);

    uint32_t graph_images() const { return most_images; }
    uint32_t graph_rows() const { return most_rows; }

    // Of a sequence; < 0: of the one that had the last prompt.
    const st3_account * account(llama_seq_id seq_id) const;
    llama_seq_id        last_asked() const { return last_seq; }

    void note_reason(llama_seq_id seq_id, const std::string & reason) { accounts[seq_id].reason = reason; }

    st3_waits waits;

    // That this is the memory of.
    void belongs_to(llama_context * ctx) { lctx = ctx; }

    // Most cells that a stage has in use for the stream of a sequence.
    uint32_t n_used(llama_seq_id seq_id) const;

    // Calls fn(cell, weight) for each visual token of a sequence that stands for more than itself in a stage.
    template <typename F> void each_weight(llama_seq_id seq_id, uint32_t stage, F && fn) const {
        for (const auto & image : images.of(seq_id)) {
            if (image.weights.empty()) {
                continue;
            }
            const auto h = held(seq_id, image, stage);
            for (size_t i = 0; i < h.ids.size(); ++i) {
                if (const float w = image.weights[stage][h.ids[i]]; w > 1.0f) {
                    fn(h.cells[i], w);
                }
            }
        }
    }

    // Weights of a layer.
    const llama_layer & layer(int32_t il) const;

    // Tokens that were computed for a sequence, whether they left or not.
    uint32_t n_given(llama_seq_id seq_id) const;

    struct held_t {
        std::vector<uint32_t> ids;    // of an image's tokens, ascending
        std::vector<uint32_t> cells;  // theirs
    };

    // What a stage holds of an image now, and how many tokens that is.
    held_t   held(llama_seq_id seq_id, const st3_image & image, uint32_t stage) const;
    uint32_t n_held(llama_seq_id seq_id, const st3_image & image, uint32_t stage) const;

    // After a ubatch was computed. out: the scores of its records, F32 (st3_graph_input); null if there is none.
    void
    finish(const llama_ubatch & ubatch, st3_work & work, const st3_plan * plan,
           const std::vector<llama_kv_cache::slot_info> & slots, ggml_tensor * out, ggml_backend_sched_t sched);

    // Gives back memory that no cell needs. Between batches only.
    void trim();

    const st3_kv & stage(uint32_t i) const { return *stages[i]; }

    st3_kv & stage(uint32_t i) { return *stages[i]; }

    uint32_t n_stage() const { return (uint32_t) stages.size(); }

    // Where the keys of a layer are; null: in the host's memory, with the CPU.
    ggml_backend_dev_t device(int32_t il) const;

    // Of layers with a sliding window; 0: there are none.
    int32_t n_window() const;

    // Changes whenever any stage's tensors are replaced.
    uint64_t generation() const;

    const st3_schedule schedule;
    const uint32_t     n_seq_max;

    st3_images images;

  private:
    // Scores on their way from the device. Several may be, as nobody waits for them until tokens are to leave.
    struct pending_t {
        std::vector<st3_record> records;
        ggml_backend_buffer_ptr buf;
        size_t                  n;
    };

    struct cut_scores_t {
        std::vector<st3_token>          tokens;
        std::vector<std::vector<float>> scores;  // [cut][token]
    };

    st3_record make_record(const llama_ubatch & ubatch, llama_seq_id seq_id, bool cut) const;
    st3_record make_record(const st3_plan & plan, const std::vector<llama_kv_cache::slot_info_vec_t> & slots) const;

    // A sequence's rows in a batch.
    struct share_t {
        uint32_t n      = 0;
        size_t   last   = 0;  // ubatch
        bool     output = false;

        bool generated() const { return n == 1 && output; }
    };

    static std::map<llama_seq_id, share_t> shares_of(const std::vector<llama_ubatch> & ubatches);

    std::vector<llama_ubatch> split(llama_batch_allocr & balloc, uint32_t n_ubatch) const;

    std::vector<llama_kv_cache::slot_info_vec_t>
    find_slots(const std::vector<llama_ubatch> & ubatches, const st3_plan * plan);

    void add_work(st3_work & work, const llama_ubatch & ubatch, llama_seq_id seq_id, const share_t & share) const;

    bool fit(const std::vector<llama_ubatch> & ubatches, const st3_plan * plan);

    void find_images(std::vector<st3_work> & works, const std::vector<llama_ubatch> & ubatches) const;
    void add_images(const st3_work & work);
    void take_account(const llama_ubatch & ubatch, const st3_work & work, const st3_plan * plan);
    void commit(const st3_plan & plan, const std::vector<llama_kv_cache::slot_info> & slots, st3_work & work);
    void collect(std::vector<st3_record> records, ggml_tensor * out, ggml_backend_sched_t sched);
    void absorb();
    void evict(llama_seq_id seq_id);
    void anneal(llama_seq_id seq_id);
    void synchronize() const;

    // Frees the cells of those that are not among `kept`, ascending.
    void drop(llama_seq_id seq_id, uint32_t stage, const held_t & there, const std::vector<uint32_t> & kept);

    // The values of cells in the first layer of a stage, F32 [cells][n_embd_v]. Waits for the device.
    std::vector<float> values(llama_seq_id seq_id, uint32_t stage, const std::vector<uint32_t> & cells) const;

    // Of an image's tokens that a stage holds, `kept`, ascending and not empty, stay: each other gives its weight to the one most
    // like it. The rows of the residual stream are gone; the values that the stage's first layer made of them, which carry no
    // position, are compared instead. alike: of the stage, made where it is null, for later calls; null: there are none. False, with
    // nothing done but a line in the log, where there is no memory for it.
    bool hand_over(
            llama_seq_id seq_id, uint32_t stage, const held_t & there, const std::vector<uint32_t> & kept,
            std::vector<float> & weights, std::shared_ptr<const st3_likeness> * alike) const;

    const llama_model & model;
    const bool          unified;

    llama_context * lctx = nullptr;

    std::vector<std::unique_ptr<st3_kv>> stages;

    std::vector<st3_span> expected;
    uint32_t              most_images = 4;  // of a prompt, that graphs have room for
    uint32_t              most_rows   = 0;

    std::map<llama_seq_id, st3_account> accounts;
    llama_seq_id                        last_seq = 0;

    std::deque<pending_t>                pending;
    std::vector<ggml_backend_buffer_ptr> spare;  // of pending scores that were absorbed

    std::map<llama_seq_id, cut_scores_t> cut_scores;  // absorbed, for evict()
};

class st3_memory_context : public llama_memory_context_i {
  public:
    explicit st3_memory_context(llama_memory_status status) : status(status) {}

    // a full cache, or an update of it
    st3_memory_context(st3_memory * mem, std::vector<llama_memory_context_ptr> stages);

    // a batch; slots[stage][ubatch], works[ubatch]; plan, if any, is for the only ubatch
    st3_memory_context(
            st3_memory * mem, std::vector<llama_kv_cache::slot_info_vec_t> slots, std::vector<llama_ubatch> ubatches,
            std::vector<st3_work> works, std::unique_ptr<st3_plan> plan);

    bool next() override;
    bool apply() override;

    llama_memory_status  get_status() const override { return status; }
    const llama_ubatch & get_ubatch() const override { return ubatches[i_cur]; }

    const llama_kv_cache_context * stage(uint32_t i) const {
        return static_cast<llama_kv_cache_context *>(stages[i].get());
    }

    uint32_t n_stage() const { return (uint32_t) stages.size(); }

    const st3_schedule & schedule() const { return mem->schedule; }

    uint64_t generation() const { return mem->generation(); }

    ggml_backend_dev_t device(int32_t il) const { return mem->device(il); }

    const llama_layer & layer(int32_t il) const { return mem->layer(il); }

    // To the mask that the host wrote for a stage: the logarithms of the weights of images that were there before; those tokens
    // of the plan's images that see each other; what is too far away for a sliding window.
    void add_weights(uint32_t stage, const llama_ubatch & ubatch, ggml_tensor * mask) const;
    void see_ahead(uint32_t stage, ggml_tensor * mask) const;
    void add_window(uint32_t stage, const llama_ubatch & ubatch, ggml_tensor * mask) const;

    // Whether a row of a ubatch is too far from a cell that it sees for the model's sliding window.
    bool exceeds_window(const llama_ubatch & ubatch) const;

    // Of a plan: the positions of a stage's first n cells, 0 where there is none, and the cells of its rows.
    std::vector<float>            cell_positions(uint32_t stage, int64_t n) const;
    const std::vector<uint32_t> & row_cells(uint32_t stage) const { return slots[stage][0].idxs[0]; }

    st3_plan * plan() const { return plan_.get(); }

    // Of the current ubatch; none for a full cache.
    const std::vector<st3_record> & records() const;

    // The current ubatch's scores will be in out once it is computed.
    void attach(ggml_tensor * out, ggml_backend_sched_t sched) const {
        out_   = out;
        sched_ = sched;
    }

  private:
    llama_memory_status status;

    st3_memory * mem = nullptr;

    std::vector<llama_memory_context_ptr>        stages;
    std::vector<llama_kv_cache::slot_info_vec_t> slots;
    std::vector<llama_ubatch>                    ubatches;
    std::vector<st3_work>                        works;
    std::unique_ptr<st3_plan>                    plan_;

    mutable ggml_tensor *        out_   = nullptr;  // the graph's inputs see a const context
    mutable ggml_backend_sched_t sched_ = nullptr;

    size_t i_cur = 0;
};

// Why ST3 cannot run on a model or context although its metadata asks for it; "" if it can.
std::string st3_unsupported(const llama_model & model, const llama_memory_params * params);
