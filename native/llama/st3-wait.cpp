#include "st3-wait.h"

#include "llama-impl.h"
#include "st3-embed.h"
#include "st3-seam.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <string>
#include <utility>

// Why a prompt with images, of n rows, is not pruned in the compute; "" if it can be. causal: attention as a pruned prompt can
// have it.
static std::string why_not(const llama_context & ctx, uint32_t n, bool causal) {
    const auto & cparams = ctx.get_cparams();
    const auto & hparams = ctx.get_model().hparams;

    if (n > cparams.n_batch) {
        return format(
                "the image and its question, %u tokens, do not fit one batch of %u (raise n_batch)", n,
                cparams.n_batch);
    }
    const auto & layers = cparams.embeddings_layer_inp;
    if (cparams.embeddings || cparams.embeddings_nextn || std::count(layers.begin(), layers.end(), true) > 0) {
        return "embeddings are asked for";
    }
    if (!hparams.causal_attn || !causal) {
        return "attention is not causal";
    }
    return "";
}

// What fn returns, a llama_decode() code; -2 if it throws, which nobody above llama_decode would catch.
template <typename F> static int caught(F && fn) {
    try {
        return fn();
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        return -2;
    }
}

int llama_context::decode(const llama_batch_ext & batch) {
    auto * mem = dynamic_cast<st3_memory *>(memory.get());

    if (!mem || batch.tokens.empty()) {
        return decode_now(batch);
    }
    return caught([&] { return st3_seam(*this, *mem).decode(batch); });
}

int st3_decode_waiting(llama_context & ctx, llama_seq_id seq_id) {
    auto * mem = dynamic_cast<st3_memory *>(ctx.get_memory());

    return mem && mem->waits.of(seq_id) ? st3_seam(ctx, *mem).decode_between(seq_id) : 0;
}

void st3_compute_waiting(llama_context & ctx) {
    auto * mem = dynamic_cast<st3_memory *>(ctx.get_memory());

    for (llama_seq_id id = 0; mem && id < (llama_seq_id) mem->n_seq_max; ++id) {
        if (st3_decode_waiting(ctx, id) != 0) {
            LLAMA_LOG_WARN("%s: what waits in sequence %d will be computed with other adapters\n", __func__, id);
        }
    }
}

int st3_seam::decode(const llama_batch_ext & in) {
    shares_t shares;
    bool     shared = false;
    for (size_t i = 0; i < in.tokens.size(); ++i) {
        shared |= in.tokens[i].seq_ids.size() != 1;
        for (const auto id : in.tokens[i].seq_ids) {
            auto & share = shares[id];
            share.rows.push_back(i);
            share.output |= in.tokens[i].output;
        }
    }
    const bool alone   = !shared && shares.size() == 1;
    const bool image   = in.n_embd > 0 && in.tokens[0].id == LLAMA_TOKEN_NULL && mem.waits.announced.left > 0;
    const bool follows = std::any_of(
            shares.begin(), shares.end(), [&](const auto & share) { return mem.waits.of(share.first) != nullptr; });
    const bool holds = alone && !shares.begin()->second.output && (in.n_embd == 0 || image);
    if (image && !holds) {
        for (const auto & [seq_id, share] : shares) {
            mem.note_reason(seq_id, alone ? "an output is asked for in the image" : "an image of several sequences");
        }
    }
    if (in.tokens.size() > n_batch || (!follows && !holds)) {
        return ctx.decode_now(in);
    }
    if (in.n_embd > 0 && in.n_embd != in.n_embd_inp) {
        return ctx.decode_now(in);  // which says what is wrong with it
    }
    if (!valid(in)) {
        LLAMA_LOG_ERROR("%s: failed to initialize batch\n", __func__);
        return -1;
    }
    if (image && holds) {
        return decode_image(in, shares.begin()->first);
    }
    if (in.n_embd == 0 && !shared) {
        return decode_text(in, shares);
    }
    for (const auto & [seq_id, share] : shares) {
        if (const int res = decode_all(seq_id)) {
            return res;
        }
    }
    return ctx.decode_now(in);
}

// Whether the tokens of an image, and of what waits before them, are in order of their places, as a cut leaves them.
static bool ascending(const std::vector<llama_batch_ext::token> & tokens, const st3_prompt * before) {
    auto last = before ? st3_place::of(before->pos.back()) : st3_place{};
    for (const auto & token : tokens) {
        const auto place = st3_place::of(token.pos);
        if (!(last < place)) {
            return false;
        }
        last = place;
    }
    return true;
}

// An image, or a part of it, waits if it may.
int st3_seam::decode_image(const llama_batch_ext & in, llama_seq_id seq_id) {
    const auto     n      = (uint32_t) in.tokens.size();
    const auto *   prompt = mem.waits.of(seq_id);
    const uint32_t held   = prompt ? prompt->n_rows() : 0;
    const uint32_t lead   = prompt ? prompt->n_lead() : 0;
    const auto     left   = mem.waits.announced.left;

    // tiles of a picture with nothing between them are one image, but for those that see only themselves
    const bool goes_on = mem.waits.announced.begins() && mem.waits.same_picture(seq_id);
    if (goes_on && ctx.cparams.causal_attn) {
        const auto & list = mem.images.of(seq_id);
        if (prompt && prompt->ends_in_image()) {
            const auto & span = prompt->images.back();
            mem.waits.announced.join(span.n, span.nx, span.ny);
        } else if (
                !prompt && !list.empty() && !list.back().pruned &&
                list.back().places.back().pos + 1 == in.tokens[0].pos[0]) {
            const auto & image = list.back();
            mem.waits.announced.join((uint32_t) image.places.size(), image.nx, image.ny);
        }
    }

    // the rest of an image whose beginning was computed is computed as well
    const bool rest   = !mem.waits.announced.begins() && !(prompt && prompt->ends_in_image());
    // and what one question asks about is all pruned in one way
    const bool beside = mem.has_unpruned(seq_id);

    // where its tokens see each other, they are computed by themselves in one piece, as upstream asks
    const bool causal = ctx.cparams.causal_attn;
    const bool piece  = causal || (mem.waits.announced.begins() && n == left && n <= ctx.cparams.n_ubatch);

    auto why = why_not(ctx, held - lead + left, piece);
    if (why.empty() && !ascending(in.tokens, prompt)) {
        why = "the places of the image's tokens do not ascend";
    }
    if (n <= left && !rest && !beside && why.empty()) {
        if (held + left > n_batch && lead > 0) {
            if (const int res = decode_waiting(seq_id, lead)) {
                return res;
            }
        }
        if (!fits(seq_id, n)) {
            LLAMA_LOG_WARN("%s: failed to find a memory slot for an image of %u tokens\n", __func__, n);
            return 1;
        }
        auto & picture = mem.waits.pictures[seq_id];
        auto   came    = mem.waits.announced.picture;
        hold(in, seq_id, {});
        picture       = std::move(came);
        ctx.n_outputs = 0;  // as after any batch without outputs
        return 0;
    }
    if (!why.empty()) {
        mem.note_reason(seq_id, why);
    }
    if (const int res = decode_all(seq_id)) {
        return res;
    }
    const int res = ctx.decode_now(in);
    if (res == 0) {
        mem.waits.pictures[seq_id] = mem.waits.announced.picture;
    }
    return res;
}

int st3_seam::decode_text(const llama_batch_ext & in, const shares_t & shares) {
    std::vector<llama_seq_id> asks;   // whose question comes
    std::vector<llama_seq_id> holds;  // that wait on
    std::vector<size_t>       rest;   // rows of all others

    for (const auto & [seq_id, share] : shares) {
        const auto   n      = (uint32_t) share.rows.size();
        const auto * prompt = mem.waits.of(seq_id);
        const bool   image  = prompt && !prompt->images.empty();
        const auto   why = why_not(ctx, (image ? prompt->n_rows() - prompt->n_lead() : 0) + n, ctx.cparams.causal_attn);
        // backend samplers write where only one compute of the batch can
        const bool   one = ctx.sampling.samplers.empty() || shares.size() == 1;

        if (image && why.empty() && one) {
            if (prompt->n_rows() + n > n_batch) {
                if (const int res = decode_waiting(seq_id, prompt->n_lead())) {
                    return res;
                }
            }
            (share.output ? asks : holds).push_back(seq_id);
            continue;
        }
        if (image) {
            mem.note_reason(seq_id, why.empty() ? "several sequences have backend samplers" : why);
        }
        if (const int res = decode_all(seq_id)) {
            return res;
        }
        // text alone may be what comes before an image
        if (!image && !share.output && shares.size() == 1 && n < n_batch && why.empty() && !mem.has_unpruned(seq_id)) {
            holds.push_back(seq_id);
        } else {
            rest.insert(rest.end(), share.rows.begin(), share.rows.end());
        }
    }
    for (const auto seq_id : holds) {
        if (!fits(seq_id, (uint32_t) shares.at(seq_id).rows.size())) {
            LLAMA_LOG_WARN(
                    "%s: failed to find a memory slot for %zu tokens\n", __func__, shares.at(seq_id).rows.size());
            return 1;
        }
    }

    const bool gather = asks.size() + !rest.empty() > 1;

    std::map<size_t, std::vector<float>> outputs;  // by row of the batch

    std::vector<llama_seq_id> done;  // is taken back where a later part fails
    done.reserve(in.tokens.size());  // of which each adds one at most

    const int res = caught([&] {
        const auto computed = [&](const std::vector<size_t> & rows, size_t first) {
            gather ? take_outputs(rows, first, outputs) : renumber(rows, first);
        };
        for (const auto seq_id : asks) {
            const auto & share = shares.at(seq_id);
            const auto   n     = (size_t) mem.waits.of(seq_id)->n_rows();
            if (const int code = ask(in, seq_id, share)) {
                return code;
            }
            done.push_back(seq_id);
            computed(share.rows, n);
        }
        if (rest.size() == in.tokens.size()) {
            return ctx.decode_now(in);
        }
        if (!rest.empty()) {
            std::sort(rest.begin(), rest.end());
            llama_batch_ext others(&ctx);
            for (const size_t i : rest) {
                others.tokens.push_back(in.tokens[i]);
            }
            const int code = caught([&] { return ctx.decode_now(others); });
            if (code == 0 || code == -2) {  // what is thrown leaves its rows there, too
                for (const size_t i : rest) {
                    done.push_back(*in.tokens[i].seq_ids.begin());
                }
            }
            if (code != 0) {
                return code;
            }
            computed(rest, 0);
        }
        for (const auto seq_id : holds) {
            hold(in, seq_id, shares.at(seq_id));
            done.push_back(seq_id);
        }
        if (gather) {
            put_outputs(outputs);
        } else if (asks.empty() && rest.empty()) {
            ctx.n_outputs = 0;
        }
        return 0;
    });
    for (size_t i = 0; res != 0 && i < done.size(); ++i) {
        mem.seq_rm(done[i], in.tokens[shares.at(done[i]).rows[0]].pos[0], -1);
    }
    return res;
}

// The image and the text that wait in a sequence, and its question, become one batch.
int st3_seam::ask(const llama_batch_ext & in, llama_seq_id seq_id, const share_t & share) {
    auto & asked = mem.waits.asked[seq_id];
    asked.reserve(asked.size() + 1);
    const auto kept = std::make_shared<st3_prompt>();

    auto       node   = mem.waits.waiting.extract(seq_id);
    auto &     prompt = node.mapped();
    const auto n_held = prompt.n_rows();

    const int res = caught([&] {
        add_tokens(prompt, in, share);
        auto batch = st3_make_batch(ctx, *ctx.loras, prompt, seq_id, true);
        for (size_t i = 0; i < share.rows.size(); ++i) {
            batch.tokens[n_held + i].output = in.tokens[share.rows[i]].output;
        }
        ctx.sched_need_reserve |= mem.make_room_in_graph((uint32_t) prompt.images.size(), prompt.n_rows());
        ctx.sched_reserve();  // now: in the middle of the decode it would end what the context times

        mem.expect(prompt.images);
        return ctx.decode_now(batch);
    });
    mem.expect({});

    if (res != 0) {  // it waits again, by what cannot fail
        mem.seq_rm(seq_id, prompt.p0(), -1);
        prompt.tokens.resize(n_held);
        prompt.pos.resize(n_held);
        mem.waits.waiting.insert(std::move(node));
        return res;
    }
    // that buffers grew for it is no surprise
    for (size_t i = 0; i < ctx.backend_ptrs.size(); ++i) {
        ctx.backend_buf_exp_size[i] = ggml_backend_sched_get_buffer_size(ctx.sched.get(), ctx.backend_ptrs[i]);
    }
    if (prompt.keep) {
        *kept = std::move(prompt);
        asked.push_back(kept);
    }
    return 0;
}

void st3_seam::add_tokens(st3_prompt & prompt, const llama_batch_ext & in, const share_t & share) const {
    std::vector<llama_token> ids;
    std::vector<st3_pos>     pos;
    for (const size_t i : share.rows) {
        const auto & row = in.tokens[i];
        ids.push_back(row.id);
        pos.push_back(st3_text_pos(row.pos[0], ctx.model.hparams.n_pos_per_embd()));
    }
    prompt.add_tokens(ids, pos);
}

// Adds a share to what waits in its sequence: text, or a part of the announced image. Where it throws, nothing was added.
void st3_seam::hold(const llama_batch_ext & in, llama_seq_id seq_id, const share_t & share) {
    const auto it = mem.waits.waiting.find(seq_id);
    st3_prompt first;
    auto &     prompt = it == mem.waits.waiting.end() ? first : it->second;
    if (in.n_embd == 0) {
        add_tokens(prompt, in, share);
    } else {
        std::vector<st3_pos> pos;
        for (const auto & row : in.tokens) {
            pos.push_back(row.pos);
        }
        prompt.add_image(mem.waits.announced, in.embd.data(), pos, (uint32_t) in.n_embd, ctx.cparams.causal_attn);
    }
    if (it == mem.waits.waiting.end()) {
        mem.waits.waiting.emplace(seq_id, std::move(first));
    }
    if (in.n_embd > 0) {
        mem.waits.announced.left -= (uint32_t) in.tokens.size();
    }
}

// Whether n rows more of a sequence will find cells.
bool st3_seam::fits(llama_seq_id seq_id, uint32_t n) const {
    const uint32_t stream = mem.stage(0).get_stream(seq_id);

    uint64_t need = n;
    for (const auto & [id, prompt] : mem.waits.waiting) {
        need += mem.stage(0).get_stream(id) == stream ? prompt.n_rows() : 0;
    }
    return mem.n_used(seq_id) + need <= mem.stage(0).n_max;
}

int st3_seam::decode_all(llama_seq_id seq_id) {
    const auto * prompt = mem.waits.of(seq_id);
    return prompt ? decode_waiting(seq_id, prompt->n_rows()) : 0;
}

// All that waits, between two batches of the caller, who may still read the logits of the last one.
int st3_seam::decode_between(llama_seq_id seq_id) {
    std::map<size_t, std::vector<float>> outputs;
    if (ctx.n_outputs > 0 && ctx.logits.data) {
        std::vector<size_t> rows(ctx.output_ids.size());
        std::iota(rows.begin(), rows.end(), 0);
        take_outputs(rows, 0, outputs);
    }
    const int res = decode_all(seq_id);
    if (!outputs.empty()) {
        put_outputs(outputs);
    }
    return res;
}

// The first n_rows that wait, as they came: text as tokens, each image by itself.
int st3_seam::decode_waiting(llama_seq_id seq_id, uint32_t n_rows) {
    const auto announced = mem.waits.announced;  // the caller's
    const bool causal    = ctx.cparams.causal_attn;
    mem.waits.asked.try_emplace(seq_id);  // or seq_rm, which must not fail, would

    auto         node   = mem.waits.waiting.extract(seq_id);
    const auto & prompt = node.mapped();
    st3_prompt   after;  // what of it waits on

    const int res           = caught([&] {
        after = prompt.part(n_rows, prompt.n_rows());
        for (uint32_t i = 0, end = 0; i < n_rows; i = end) {
            end                     = n_rows;
            ctx.cparams.causal_attn = true;
            for (const auto & span : prompt.images) {
                if (i >= span.row && i < span.row + span.n) {
                    end                     = std::min(end, span.row + span.n);
                    ctx.cparams.causal_attn = span.causal;
                    mem.waits.announced     = { span.n, span.nx, span.ny, span.n - (i - span.row), prompt.keep };
                } else if (span.row > i) {
                    end = std::min(end, span.row);
                }
            }
            end = std::min(end, i + n_batch);
            if (!ctx.cparams.causal_attn && end - i > ctx.cparams.n_ubatch) {  // a state of another context
                LLAMA_LOG_ERROR(
                                  "%s: an image of %u tokens that see each other needs n_ubatch of as many\n", __func__, end - i);
                return -1;
            }
            if (const int code = ctx.decode_now(st3_make_batch(ctx, *ctx.loras, prompt.part(i, end), seq_id, false))) {
                return code;
            }
        }
        return 0;
    });
    ctx.cparams.causal_attn = causal;
    mem.waits.announced     = announced;

    if (res != 0) {
        mem.seq_rm(seq_id, prompt.p0(), -1);
        mem.waits.waiting.insert(std::move(node));
    } else if (after.n_rows() > 0) {
        node.mapped() = std::move(after);
        mem.waits.waiting.insert(std::move(node));
    }
    return res;
}
