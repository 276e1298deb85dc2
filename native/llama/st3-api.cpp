// st3-api.cpp - the functions of st3.h.

#include "attn-span.h"
#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-graph.h"
#include "st3-memory.h"
#include "st3-state.h"
#include "st3.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <locale>
#include <map>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace {

thread_local std::string last_error;

constexpr int32_t ERR_ARGUMENT = -100;

// Runs fn and turns an exception into st3_last_error() and the given result.
template <typename T, typename F> T guarded(T on_error, F && fn) {
    last_error.clear();
    try {
        return fn();
    } catch (const std::exception & e) {
        last_error = e.what();
    } catch (...) {
        last_error = "st3: unknown error";
    }
    return on_error;
}

void require(bool ok, const std::string & what) {
    if (!ok) {
        throw std::invalid_argument("st3: " + what);
    }
}

st3_memory * pruned_memory(const llama_context * ctx) { return dynamic_cast<st3_memory *>(ctx->get_memory()); }

uint32_t n_rows(const st3_piece * pieces, size_t n_pieces) {
    uint64_t n = 0;
    for (size_t i = 0; i < n_pieces; ++i) {
        n += pieces[i].n;
    }
    require(n <= INT32_MAX, "the prompt has too many positions");
    return (uint32_t) n;
}

void check_pieces(const llama_context * ctx, const st3_piece * pieces, size_t n_pieces) {
    const auto &  hparams = ctx->get_model().hparams;
    const int32_t n_vocab = ctx->get_model().vocab.n_tokens();

    require(pieces && n_pieces > 0, "the prompt is empty");
    for (size_t i = 0; i < n_pieces; ++i) {
        const auto & p = pieces[i];
        require(p.n > 0 && !p.tokens != !p.embd, "a piece needs a positive length and either tokens or embeddings");
        if (p.embd) {
            require(hparams.n_pos_per_embd() == 1 && hparams.n_embd_inp() == hparams.n_embd,
                    "images of models with several positions a token (M-RoPE) or wider inputs are not supported");
            require(p.nx >= 0 && p.ny >= 0 && ((p.nx == 0 && p.ny == 0) || int64_t(p.nx) * p.ny == p.n),
                    format("an image of %d tokens is no grid of %d x %d", p.n, p.nx, p.ny));
        } else {
            for (int32_t j = 0; j < p.n; ++j) {
                require(p.tokens[j] >= 0 && p.tokens[j] < n_vocab,
                        format("token %d is not in the vocabulary", p.tokens[j]));
            }
        }
    }
    require(pieces[n_pieces - 1].tokens, "the last piece must be text");
}

// Rows of token_embd, dequantized as ggml_get_rows does. out F32 [n][n_embd].
void embed_tokens(const llama_model & model, const llama_token * tokens, int32_t n, float * out) {
    const ggml_tensor * t      = model.tok_embd;
    const int64_t       n_embd = t->ne[0];
    const auto          cast   = ggml_get_type_traits(t->type)->to_float;

    std::vector<uint8_t> row(ggml_row_size(t->type, n_embd));
    for (int32_t i = 0; i < n; ++i) {
        ggml_backend_tensor_get(t, row.data(), tokens[i] * t->nb[1], row.size());
        if (t->type == GGML_TYPE_F32) {
            memcpy(out + i * n_embd, row.data(), row.size());
        } else {
            cast(row.data(), out + i * n_embd, n_embd);
        }
    }
}

// One batch of one sequence: tokens, or embeddings F32 [n][n_embd].
int32_t
decode(llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_token * tokens, float * embd, int32_t n,
       bool last) {
    std::vector<llama_pos>      pos(n);
    std::vector<int32_t>        n_seq_id(n, 1);
    std::vector<llama_seq_id *> seq_ids(n, &seq_id);
    std::vector<int8_t>         output(n, 0);
    for (int32_t i = 0; i < n; ++i) {
        pos[i] = p0 + i;
    }
    output[n - 1] = last;

    return llama_decode(ctx, { n, tokens, embd, pos.data(), n_seq_id.data(), seq_ids.data(), output.data() });
}

// As mtmd decodes a prompt: piece by piece, in batches of n_batch. mem: tells it the images' grids; may be null.
int32_t decode_pieces(
        llama_context * ctx, st3_memory * mem, llama_seq_id seq_id, llama_pos p0, const st3_piece * pieces,
        size_t n_pieces, bool output) {
    const int32_t n_batch = (int32_t) ctx->get_cparams().n_batch;
    const int64_t n_embd  = ctx->get_model().hparams.n_embd;

    for (size_t i = 0; i < n_pieces; ++i) {
        const auto & p = pieces[i];
        if (mem) {
            mem->announce(p.tokens ? 0 : p.nx > 0 ? p.nx : p.n, p.tokens ? 0 : p.nx > 0 ? p.ny : 1);
        }
        for (int32_t j = 0; j < p.n; j += n_batch) {
            const int32_t n    = std::min(n_batch, p.n - j);
            const bool    last = output && i + 1 == n_pieces && j + n == p.n;
            const int32_t res =
                    decode(ctx, seq_id, p0, p.tokens ? const_cast<llama_token *>(p.tokens) + j : nullptr,
                           p.embd ? const_cast<float *>(p.embd) + j * n_embd : nullptr, n, last);
            if (res != 0) {
                return res;
            }
            p0 += n;
        }
    }
    return 0;
}

int32_t decode_pruned(
        llama_context * ctx, st3_memory * mem, llama_seq_id seq_id, llama_pos p0, const st3_piece * pieces,
        size_t n_pieces) {
    const auto &  model  = ctx->get_model();
    const int64_t n_embd = model.hparams.n_embd;

    std::vector<float>    embd(n_rows(pieces, n_pieces) * n_embd);
    std::vector<st3_span> images;

    uint32_t row = 0;
    for (size_t i = 0; i < n_pieces; ++i) {
        const auto & p = pieces[i];
        if (p.tokens) {
            embed_tokens(model, p.tokens, p.n, embd.data() + row * n_embd);
        } else {
            std::copy_n(p.embd, p.n * n_embd, embd.data() + row * n_embd);
            const bool grid = p.nx > 0;
            images.push_back(
                    { row, (uint32_t) p.n, grid ? (uint32_t) p.nx : (uint32_t) p.n, grid ? (uint32_t) p.ny : 1u });
        }
        row += p.n;
    }

    mem->expect(std::move(images));
    const std::unique_ptr<st3_memory, void (*)(st3_memory *)> done(mem, [](st3_memory * m) { m->expect({}); });

    return decode(ctx, seq_id, p0, nullptr, embd.data(), (int32_t) row, true);
}

// Positions of the text before a prompt's first image.
uint32_t n_history(const st3_piece * pieces, size_t n_pieces) {
    uint32_t n = 0;
    for (size_t i = 0; i < n_pieces && pieces[i].tokens; ++i) {
        n += pieces[i].n;
    }
    return n;
}

// Why a prompt of n positions from its first image on is not pruned in the compute; "" if it can be.
std::string why_not(const llama_context * ctx, const st3_memory * mem, size_t n_images, uint32_t n) {
    const auto & cparams = ctx->get_cparams();

    if (!mem) {
        const auto & model = ctx->get_model();
        return st3_make_schedule(model.gguf_kv, model.hparams.n_layer()).off() ? "" : st3_unsupported(model, nullptr);
    }
    if (n_images == 0) {
        return "the prompt has no image";
    }
    if (n_images > ST3_MAX_IMAGES) {
        return format("the prompt has %zu images, more than %u", n_images, ST3_MAX_IMAGES);
    }
    if (n > std::min(cparams.n_ubatch, cparams.n_batch)) {
        return format(
                "the image and its question, %u positions, do not fit one batch of %u (raise n_ubatch and n_batch)", n,
                std::min(cparams.n_ubatch, cparams.n_batch));
    }
    const auto & layers = cparams.embeddings_layer_inp;
    if (cparams.embeddings || cparams.embeddings_nextn || std::count(layers.begin(), layers.end(), true) > 0) {
        return "embeddings are asked for";
    }
    if (!ctx->get_model().hparams.causal_attn || !cparams.causal_attn) {
        return "attention is not causal";
    }
    return "";
}

// Refuses what there is no room for, before any work.
void check_room(const llama_context * ctx, const st3_memory * mem, llama_seq_id seq_id, llama_pos p0, uint32_t n) {
    const uint32_t  n_ctx = ctx->get_cparams().n_ctx_seq;
    const uint32_t  used  = mem ? mem->n_used(seq_id) : (uint32_t) p0;
    const llama_pos end   = ctx->get_memory()->seq_pos_max(seq_id) + 1;

    require(p0 == end, format("the sequence goes on at position %d, not at %d", end, p0));
    require(n <= n_ctx && used <= n_ctx - n,
            format("the prompt of %u positions does not fit: %u of %u KV cells (n_ctx) are in use", n, used, n_ctx));
}

// What the sequence's images are like after a prefill.
void note_images(const st3_memory & mem, st3_state & state) {
    const auto & list = mem.images.of(state.seq_id);

    state.counts.assign(mem.schedule.cuts.size(), {});
    for (const auto & image : list) {
        state.images.push_back((uint32_t) image.pos.size());
        for (size_t c = 0; c < state.counts.size(); ++c) {
            state.counts[c].push_back(image.pruned ? image.n0[c + 1] : (uint32_t) image.pos.size());
        }
    }
    for (uint32_t il = 0; il < mem.schedule.n_layer; ++il) {
        state.per_layer.push_back(0);
        for (const auto & image : list) {
            state.per_layer.back() += mem.n_held(state.seq_id, image, mem.schedule.stage((int32_t) il));
        }
    }
    const auto any = [&](bool st3_image::*what) {
        return std::any_of(list.begin(), list.end(), [&](const st3_image & image) { return image.*what; });
    };
    state.mode = any(&st3_image::evicted) ? ST3_MODE_EVICT_ONLY :
                 any(&st3_image::pruned)  ? ST3_MODE_PRUNED_PREFILL :
                                            ST3_MODE_OFF;
}

//
// report
//

std::string quote(const std::string & s) {
    std::string res = "\"";
    for (const char c : s) {
        if (c == '"' || c == '\\') {
            res += '\\';
        }
        res += (unsigned char) c < 0x20 ? ' ' : c;
    }
    return res + "\"";
}

template <typename T> std::string list(const std::vector<T> & v) {
    std::ostringstream ss;
    ss.imbue(std::locale::classic());
    for (size_t i = 0; i < v.size(); ++i) {
        ss << (i ? ", " : "[") << v[i];
    }
    return v.empty() ? "[]" : ss.str() + "]";
}

struct kv_bytes {
    size_t allocated = 0;
    size_t live      = 0;
    size_t full      = 0;
};

size_t cells_used(const llama_kv_cache & kv) {
    size_t res = 0;
    for (uint32_t s = 0; s < kv.get_n_stream(); ++s) {
        res += kv.get_cells((llama_seq_id) s).get_used();  // sequence s lives in stream s, all in one if unified
    }
    return res;
}

size_t image_positions(const st3_image & image) {
    return std::count_if(image.pos.begin(), image.pos.end(), [](llama_pos p) { return p >= 0; });
}

size_t cell_bytes(const llama_kv_cache & kv, const llama_hparams & hparams, int32_t il) {
    return ggml_row_size(kv.type_k(), hparams.n_embd_k_gqa(il)) + ggml_row_size(kv.type_v(), hparams.n_embd_v_gqa(il));
}

kv_bytes count_kv_bytes(const llama_context * ctx) {
    const auto & hparams = ctx->get_model().hparams;
    kv_bytes     res;

    for (const auto & [buft, size] : ctx->get_memory()->memory_breakdown()) {
        res.allocated += size;
    }
    const auto * pruned = pruned_memory(ctx);
    const auto * stock  = dynamic_cast<const llama_kv_cache *>(ctx->get_memory());
    if (pruned || stock) {
        const llama_kv_cache & first = pruned ? pruned->stage(0) : *stock;

        size_t n_full = cells_used(first);
        for (llama_seq_id id = 0; pruned && id < (llama_seq_id) pruned->n_seq_max; ++id) {
            for (const auto & image : pruned->images.of(id)) {
                n_full += image_positions(image) - pruned->n_held(id, image, 0);
            }
        }
        for (int32_t il = 0; il < (int32_t) hparams.n_layer(); ++il) {
            const llama_kv_cache & kv = pruned ? pruned->stage(pruned->schedule.stage(il)) : *stock;
            res.live += cells_used(kv) * cell_bytes(kv, hparams, il);
            res.full += n_full * cell_bytes(kv, hparams, il);
        }
    }
    return res;
}

// Multiplications and additions of the decoder for rows[il] rows of layer il that see before[il] cells, outputs included.
double
count_flops(const llama_model & model, const std::vector<uint32_t> & rows, const std::vector<uint32_t> & before) {
    const auto & hparams = model.hparams;

    double res = 2.0 * hparams.n_embd * model.vocab.n_tokens();  // one output row
    for (const auto & [name, t] : model.tensors_by_name) {
        int il = -1;
        if (sscanf(name.c_str(), "blk.%d.", &il) == 1 && ggml_n_dims(t) >= 2 && il >= 0 && il < (int) rows.size()) {
            const double used = ggml_n_dims(t) == 3 && hparams.n_expert > 0 ?
                                        double(hparams.n_expert_used()) / hparams.n_expert :
                                        1.0;
            res += 2.0 * ggml_nelements(t) * used * rows[il];
        }
    }
    for (int32_t il = 0; il < (int32_t) rows.size(); ++il) {
        const double n    = rows[il];
        const double seen = n * before[il] + n * (n + 1) / 2;  // (query, key) pairs of a causal mask
        res += 2.0 * seen * hparams.n_head(il) * (hparams.n_embd_head_k(il) + hparams.n_embd_head_v(il));
    }
    return res;
}

std::string make_report(const llama_context * ctx) {
    const auto &   model   = ctx->get_model();
    const auto *   mem     = pruned_memory(ctx);
    const uint32_t n_layer = model.hparams.n_layer();

    st3_schedule off;
    off.n_layer = n_layer;

    const st3_schedule & s = mem ? mem->schedule : off;

    st3_state none;
    none.rows.assign(n_layer, 0);
    none.before.assign(n_layer, 0);
    none.per_layer.assign(n_layer, 0);
    const st3_state & state = ctx->st3 ? *ctx->st3 : none;

    uint32_t given = 0;
    for (const uint32_t n : state.images) {
        given += n;
    }
    std::vector<uint32_t> held(n_layer, given);
    double                budget = 0;
    for (uint32_t il = 0; il < n_layer; ++il) {
        const uint32_t stage = s.stage((int32_t) il);
        budget += given ? double(state.per_layer[il]) / given : std::pow(s.keep, stage);
        if (mem) {
            held[il] = 0;
            for (const auto & image : mem->images.of(state.seq_id)) {
                held[il] += mem->n_held(state.seq_id, image, stage);
            }
        }
    }
    std::vector<std::string> counts;
    for (size_t i = 0; i < s.cuts.size(); ++i) {
        counts.push_back(i < state.counts.size() ? list(state.counts[i]) : "[]");
    }
    const kv_bytes kv = count_kv_bytes(ctx);

    static const char * const modes[] = { "off", "pruned-prefill", "evict-only" };

    std::ostringstream ss;
    ss.imbue(std::locale::classic());  // JSON, whatever the program's is
    ss.precision(9);
    ss << "{\"mode\": \"" << modes[state.mode]
       << "\", \"reason\": " << (state.reason.empty() ? "null" : quote(state.reason))
       << ", \"preset\": " << quote(s.preset) << ", \"start\": " << s.start << ", \"stride\": " << s.stride
       << ", \"keep\": " << s.keep << ", \"min_keep\": " << s.min_keep << ", \"min_share\": " << s.min_share
       << ", \"score\": " << quote(s.score) << ", \"coverage\": " << s.coverage
       << ", \"merge\": " << (s.merge ? "true" : "false") << ", \"rank\": " << quote(s.rank_name())
       << ", \"cuts\": " << list(s.cuts) << ", \"counts\": " << list(counts) << ", \"budget\": " << budget / n_layer
       << ", \"anneal\": {\"curve\": " << quote(s.curve_name()) << ", \"tokens\": " << s.anneal_tokens
       << ", \"floor\": " << s.anneal_floor << ", \"interval\": " << s.anneal_interval
       << ", \"score\": " << quote(s.anneal_score) << "}, \"given\": " << given
       << ", \"per_layer\": " << list(state.per_layer) << ", \"held\": " << list(held)
       << ", \"kv_bytes\": {\"allocated\": " << kv.allocated << ", \"live\": " << kv.live << ", \"full\": " << kv.full
       << "}";
    ss.precision(0);
    ss << std::fixed << ", \"flops\": {\"prefill\": " << count_flops(model, state.rows, state.before)
       << ", \"prefill_full\": "
       << count_flops(
                  model, std::vector<uint32_t>(n_layer, state.n_rows),
                  std::vector<uint32_t>(n_layer, (uint32_t) state.p0))
       << "}}";
    return ss.str();
}

}  // namespace

int32_t st3_abi_version(void) { return ST3_ABI_VERSION; }

const char * st3_last_error(void) { return last_error.c_str(); }

bool st3_device_has_kernel(ggml_backend_dev_t device, ggml_type type_k, int32_t head_size) {
    return guarded(false, [&] {
        require(device, "no device");
        require(type_k >= 0 && type_k < GGML_TYPE_COUNT && ggml_blck_size(type_k) > 0, "no such type");
        require(head_size > 0 && head_size % ggml_blck_size(type_k) == 0, "no head of this size in that type");

        // a decode step over some cells
        const ggml_init_params params = { 8 * ggml_tensor_overhead(), nullptr, /*no_alloc*/ true };
        ggml_context_ptr       ctx(ggml_init(params));

        ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, head_size, 1, 1);
        ggml_tensor * k    = ggml_new_tensor_3d(ctx.get(), type_k, head_size, 256, 1);
        ggml_tensor * mask = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 256, 1);
        ggml_tensor * ids  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 256);
        return ggml_backend_dev_supports_op(
                device, ggml_attn_span(ctx.get(), q, k, mask, ids, 1.0f, GGML_ATTN_SPAN_MEAN));
    });
}

int32_t st3_check_model(const llama_model * model) {
    return guarded(-1, [&] {
        require(model, "no model");
        st3_make_schedule(model->gguf_kv, model->hparams.n_layer());
        return 0;
    });
}

int32_t st3_prefill(llama_context * ctx, llama_seq_id seq_id, llama_pos p0, const st3_piece * pieces, size_t n_pieces) {
    return guarded(ERR_ARGUMENT, [&] {
        require(ctx && ctx->get_memory(), "no context with a KV cache");
        require(seq_id >= 0 && (uint32_t) seq_id < ctx->n_seq_max() && p0 >= 0, "sequence or position out of range");
        check_pieces(ctx, pieces, n_pieces);

        auto *         mem     = pruned_memory(ctx);
        const uint32_t n       = n_rows(pieces, n_pieces);
        const uint32_t history = n_history(pieces, n_pieces);
        check_room(ctx, mem, seq_id, p0, n);

        std::vector<uint32_t> images;
        for (size_t i = 0; i < n_pieces; ++i) {
            if (pieces[i].embd) {
                images.push_back((uint32_t) pieces[i].n);
            }
        }
        const uint32_t n_layer = ctx->get_model().hparams.n_layer();
        const bool     whole   = n <= std::min(ctx->get_cparams().n_ubatch, ctx->get_cparams().n_batch);
        const auto     reason  = why_not(ctx, mem, images.size(), whole ? n : n - history);
        const bool     pruned  = mem && reason.empty();

        auto state    = std::make_shared<st3_state>();
        state->seq_id = seq_id;
        state->p0     = p0;
        state->n_rows = n;
        state->rows.assign(n_layer, n);
        state->before.assign(n_layer, (uint32_t) p0);
        for (uint32_t il = 0; mem && il < n_layer; ++il) {
            const uint32_t stage = mem->schedule.stage((int32_t) il);
            state->before[il]    = (uint32_t) mem->stage(stage).get_cells(seq_id).seq_pos_get(seq_id).size();
            for (const uint32_t m : images) {
                state->rows[il] -= pruned ? m - mem->schedule.counts(m)[stage] : 0;
            }
        }

        // whatever goes wrong from here on: nothing of the prompt stays
        const auto undo = [&](llama_context * c) {
            if (mem) {
                mem->announce(0, 0);
            }
            c->get_memory()->seq_rm(seq_id, p0, -1);
        };
        std::unique_ptr<llama_context, decltype(undo)> guard(ctx, undo);

        int32_t res = 0;
        if (!pruned) {
            res = decode_pieces(ctx, mem, seq_id, p0, pieces, n_pieces, true);
        } else {
            // what does not fit one ubatch together: the history goes first
            size_t first = 0;
            while (!whole && pieces[first].tokens) {
                first++;
            }
            const llama_pos p1 = p0 + (whole ? 0 : (llama_pos) history);

            res = first > 0 ? decode_pieces(ctx, mem, seq_id, p0, pieces, first, false) : 0;
            if (res == 0) {
                res = decode_pruned(ctx, mem, seq_id, p1, pieces + first, n_pieces - first);
            }
        }
        if (res != 0) {
            last_error = format("st3: decoding the prompt failed with code %d", res);
            return res;
        }
        (void) guard.release();

        if (mem) {
            note_images(*mem, *state);
            state->kept   = pruned ? mem->take_kept() : st3_kept_t{};
            state->owners = pruned ? mem->take_owners() : st3_kept_t{};
        } else {
            state->images = images;
            state->per_layer.assign(n_layer, std::accumulate(images.begin(), images.end(), 0u));
        }
        // images of earlier turns are as they were, and for the reason they were
        const bool earlier = images.empty() && ctx->st3 && ctx->st3->seq_id == seq_id && !state->images.empty();
        state->reason      = earlier ? ctx->st3->reason : reason;
        ctx->st3           = std::move(state);
        return res;
    });
}

// One cut's part of what the last prefill noted for each.
static int32_t
of_cut(const llama_context * ctx, st3_kept_t st3_state::*what, const char * none, int32_t i_cut, int32_t * out,
       int32_t cap) {
    return guarded(-1, [&] {
        require(ctx && (out || cap == 0), "no context or no room for the result");
        require(ctx->st3 && !(*ctx->st3.*what).empty(), none);

        const auto & cuts = *ctx->st3.*what;
        require(i_cut >= 0 && (size_t) i_cut < cuts.size(), format("there is no cut %d", i_cut));

        std::copy_n(cuts[i_cut].begin(), std::min<size_t>(cuts[i_cut].size(), std::max(0, cap)), out);
        return (int32_t) cuts[i_cut].size();
    });
}

int32_t st3_kept(const llama_context * ctx, int32_t i_cut, int32_t * out, int32_t cap) {
    return of_cut(ctx, &st3_state::kept, "no prompt was pruned", i_cut, out, cap);
}

int32_t st3_owners(const llama_context * ctx, int32_t i_cut, int32_t * out, int32_t cap) {
    return of_cut(ctx, &st3_state::owners, "no visual tokens were merged", i_cut, out, cap);
}

// Calls fn(number, position, cell) for what a layer holds of a sequence, in order of position; returns how many that is.
template <typename F> static int32_t each_cell(const llama_context * ctx, llama_seq_id seq_id, int32_t il, F && fn) {
    require(ctx && ctx->get_memory(), "no context with a KV cache");
    require(seq_id >= 0 && (uint32_t) seq_id < ctx->n_seq_max(), format("there is no sequence %d", seq_id));
    require(il >= 0 && (uint32_t) il < ctx->get_model().hparams.n_layer(), format("there is no layer %d", il));

    const auto * mem   = pruned_memory(ctx);
    const auto * stock = dynamic_cast<const llama_kv_cache *>(ctx->get_memory());
    require(mem || stock, "this kind of memory has no positions to read");

    const llama_kv_cache & kv = mem ? mem->stage(mem->schedule.stage(il)) : *stock;

    int32_t n = 0;
    for (const auto & [pos, cell] : kv.get_cells(seq_id).seq_pos_get(seq_id)) {
        fn(n++, pos, cell);
    }
    return n;
}

int32_t st3_positions(const llama_context * ctx, llama_seq_id seq_id, int32_t il, llama_pos * out, int32_t cap) {
    return guarded(-1, [&] {
        require(out || cap <= 0, "no room for the result");
        return each_cell(ctx, seq_id, il, [&](int32_t i, llama_pos pos, uint32_t) {
            if (i < cap) {
                out[i] = pos;
            }
        });
    });
}

int32_t st3_weights(const llama_context * ctx, llama_seq_id seq_id, int32_t il, float * out, int32_t cap) {
    return guarded(-1, [&] {
        require(out || cap <= 0, "no room for the result");

        std::map<uint32_t, float> weights;  // of cells, where not 1
        const auto *              mem = ctx ? pruned_memory(ctx) : nullptr;
        if (mem && il >= 0 && (uint32_t) il < mem->schedule.n_layer) {
            mem->each_weight(seq_id, mem->schedule.stage(il), [&](uint32_t cell, float w) { weights[cell] = w; });
        }
        return each_cell(ctx, seq_id, il, [&](int32_t i, llama_pos, uint32_t cell) {
            if (i < cap) {
                const auto it = weights.find(cell);
                out[i]        = it == weights.end() ? 1.0f : it->second;
            }
        });
    });
}

size_t st3_report(const llama_context * ctx, char * out, size_t cap) {
    return guarded(size_t(0), [&] {
        if (out && cap > 0) {
            out[0] = '\0';
        }
        require(ctx && ctx->get_memory() && (out || cap == 0), "no context or no room for the result");

        const std::string report = make_report(ctx);
        if (cap > 0) {
            const size_t n = std::min(report.size(), cap - 1);
            memcpy(out, report.data(), n);
            out[n] = '\0';
        }
        return report.size();
    });
}
