// st3-api.cpp - the functions of st3.h.

#include "attn-span.h"
#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-memory.h"
#include "st3-report.h"
#include "st3.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
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

bool is_position(llama_pos p) { return p >= 0 && p <= ST3_MAX_POS; }

uint32_t n_rows(const st3_piece * pieces, size_t n_pieces) {
    uint64_t n = 0;
    for (size_t i = 0; i < n_pieces; ++i) {
        n += pieces[i].n;
    }
    require(n <= INT32_MAX, "the prompt has too many positions");
    return (uint32_t) n;
}

void check_pieces(const llama_context * ctx, const st3_piece * pieces, size_t n_pieces) {
    const int32_t n_vocab = ctx->get_model().vocab.n_tokens();

    require(pieces && n_pieces > 0, "the prompt is empty");
    for (size_t i = 0; i < n_pieces; ++i) {
        const auto & p = pieces[i];
        require(p.n > 0 && !p.tokens != !p.embd, "a piece needs a positive length and either tokens or embeddings");
        if (p.embd) {
            require(p.nx >= 0 && p.ny >= 0 && ((p.nx == 0 && p.ny == 0) || int64_t(p.nx) * p.ny == p.n),
                    format("an image of %d tokens is no grid of %d x %d", p.n, p.nx, p.ny));
            require(!p.non_causal || (uint32_t) p.n <= ctx->get_cparams().n_ubatch,
                    format("an image of %d tokens that see each other does not fit n_ubatch, which is %u", p.n,
                           ctx->get_cparams().n_ubatch));
            require(!p.pos || is_position(p.n_pos - 1), "an image whose positions are given takes none, or too many");
            require(!p.pos || std::all_of(p.pos, p.pos + 4 * int64_t(p.n), is_position),
                    "a position of an image is out of range");
        } else {
            for (int32_t j = 0; j < p.n; ++j) {
                require(p.tokens[j] >= 0 && p.tokens[j] < n_vocab,
                        format("token %d is not in the vocabulary", p.tokens[j]));
            }
        }
    }
    require(pieces[n_pieces - 1].tokens, "the last piece must be text");
}

// The positions of row i of a piece that begins at p0: of an image with M-RoPE as mtmd counts them.
st3_pos pos_of(const llama_context * ctx, const st3_piece & piece, llama_pos p0, int32_t i) {
    const auto    n_pos = ctx->get_model().hparams.n_pos_per_embd();
    const int32_t nx    = piece.nx > 0 ? piece.nx : piece.n;

    if (piece.embd && piece.pos && n_pos > 1) {
        const auto * at = piece.pos + 4 * int64_t(i);
        return { at[0], at[1], at[2], at[3] };
    }
    return piece.tokens || n_pos == 1 ? st3_text_pos(p0 + i, n_pos) : st3_pos{ p0, p0 + i / nx, p0 + i % nx, 0 };
}

// How many positions a piece takes.
int32_t n_positions(const llama_context * ctx, const st3_piece & piece) {
    if (!piece.embd || ctx->get_model().hparams.n_pos_per_embd() == 1) {
        return piece.n;
    }
    return piece.pos ? piece.n_pos : piece.nx > 0 ? std::max(piece.nx, piece.ny) : piece.n;
}

// Rows [i, i + n) of a piece that begins at p0, as one batch of one sequence.
int32_t
decode(llama_context * ctx, llama_seq_id seq_id, llama_pos p0, const st3_piece & piece, int32_t i, int32_t n,
       bool last) {
    const auto & hparams = ctx->get_model().hparams;
    auto *       tokens  = piece.tokens ? const_cast<llama_token *>(piece.tokens) + i : nullptr;
    auto *       embd    = piece.embd ? const_cast<float *>(piece.embd) + int64_t(i) * hparams.n_embd_inp() : nullptr;

    std::vector<llama_pos>      pos;  // [section][n]
    std::vector<int32_t>        n_seq_id(n, 1);
    std::vector<llama_seq_id *> seq_ids(n, &seq_id);
    std::vector<int8_t>         output(n, 0);
    for (uint32_t section = 0; section < hparams.n_pos_per_embd(); ++section) {
        for (int32_t j = i; j < i + n; ++j) {
            pos.push_back(pos_of(ctx, piece, p0, j)[section]);
        }
    }
    output[n - 1] = last;

    return llama_decode(ctx, { n, tokens, embd, pos.data(), n_seq_id.data(), seq_ids.data(), output.data() });
}

void announce(st3_memory * mem, const st3_piece & piece) {
    if (mem) {
        const auto n         = piece.embd ? (uint32_t) piece.n : 0;
        const bool grid      = piece.nx > 0;
        mem->waits.announced = { n, grid ? (uint32_t) piece.nx : n, grid ? (uint32_t) piece.ny : 1, n, /*keep*/ false };
    }
}

// As mtmd decodes a prompt: piece by piece, in batches of n_batch.
int32_t decode_pieces(
        llama_context * ctx, st3_memory * mem, llama_seq_id seq_id, llama_pos p0, const st3_piece * pieces,
        size_t n_pieces) {
    const int32_t n_batch = (int32_t) ctx->get_cparams().n_batch;

    for (size_t i = 0; i < n_pieces; ++i) {
        const auto & p = pieces[i];
        announce(mem, p);

        const bool causal = ctx->get_causal_attn();
        ctx->set_causal_attn(causal && !(p.embd && p.non_causal));
        const auto restore = [=](llama_context * c) { c->set_causal_attn(causal); };
        const std::unique_ptr<llama_context, decltype(restore)> guard(ctx, restore);

        for (int32_t j = 0; j < p.n; j += n_batch) {
            const int32_t n    = std::min(n_batch, p.n - j);
            const bool    last = i + 1 == n_pieces && j + n == p.n;
            if (const int32_t res = decode(ctx, seq_id, p0, p, j, n, last)) {
                return res;
            }
        }
        p0 += n_positions(ctx, p);
    }
    return 0;
}

// Refuses what there is no room for, before any work.
void check_room(
        const llama_context * ctx, const st3_memory * mem, llama_seq_id seq_id, llama_pos p0, const st3_piece * pieces,
        size_t n_pieces) {
    const uint32_t  n     = n_rows(pieces, n_pieces);
    const auto *    waits = mem ? mem->waits.of(seq_id) : nullptr;
    const uint32_t  n_ctx = ctx->get_cparams().n_ctx_seq;
    const uint32_t  used  = mem ? mem->n_used(seq_id) + (waits ? waits->n_rows() : 0) : (uint32_t) p0;
    const llama_pos end   = ctx->get_memory()->seq_pos_max(seq_id) + 1;
    const bool      jump  = ctx->get_model().hparams.n_pos_per_embd() > 1;  // after an image

    require(p0 == end || (jump && p0 > end), format("the sequence goes on at position %d, not at %d", end, p0));
    require(n <= n_ctx && used <= n_ctx - n,
            format("the prompt of %u positions does not fit: %u of %u KV cells (n_ctx) are in use", n, used, n_ctx));

    int64_t last = p0;
    for (size_t i = 0; i < n_pieces; ++i) {
        last += n_positions(ctx, pieces[i]);
    }
    require(last <= ST3_MAX_POS, "the prompt's positions are too large");
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

bool st3_vision_fast(const llama_model * model) {
    return guarded(false, [&] {
        require(model, "no model");
        return st3_make_schedule(model->gguf_kv, model->hparams.n_layer()).vision_fast;
    });
}

double st3_prefill_flops(const llama_model * model, int32_t n_rows, int32_t n_before) {
    return guarded(-1.0, [&] {
        require(model && n_rows >= 0 && n_before >= 0, "no model, or a negative number");
        return st3_flops(*model, n_rows, n_before);
    });
}

void st3_announce_image(llama_context * ctx, int32_t n, int32_t nx, int32_t ny, const char * picture) {
    guarded(0, [&] {
        require(ctx, "no context");
        if (auto * mem = pruned_memory(ctx)) {
            mem->waits.announced = {};
            require(n >= 0 && nx >= 0 && ny >= 0, "a negative number");
            mem->waits.announced = { (uint32_t) n,  (uint32_t) nx,         (uint32_t) ny, (uint32_t) n,
                                     /*keep*/ true, picture ? picture : "" };
        }
        return 0;
    });
}

llama_token st3_sample(llama_sampler * sampler, llama_context * ctx, int32_t i) {
    // large, and needed for every token
    thread_local std::vector<llama_token_data> tokens;

    return guarded(LLAMA_TOKEN_NULL, [&] {
        require(sampler && ctx, "no sampler or no context");
        const float * logits = llama_get_logits_ith(ctx, i);
        require(logits, format("there are no logits of row %d", i));

        tokens.resize(ctx->get_model().vocab.n_tokens());
        for (size_t id = 0; id < tokens.size(); ++id) {
            tokens[id] = { (llama_token) id, logits[id], 0.0f };
        }
        llama_token_data_array left = { tokens.data(), tokens.size(), /*selected*/ -1, /*sorted*/ false };
        llama_sampler_apply(sampler, &left);
        require(left.selected >= 0 && (size_t) left.selected < left.size &&
                        std::isfinite(left.data[left.selected].logit),
                "no token of the vocabulary may follow");

        const llama_token token = left.data[left.selected].id;
        llama_sampler_accept(sampler, token);
        return token;
    });
}

int32_t st3_prefill(llama_context * ctx, llama_seq_id seq_id, llama_pos p0, const st3_piece * pieces, size_t n_pieces) {
    return guarded(ERR_ARGUMENT, [&] {
        require(ctx && ctx->get_memory(), "no context with a KV cache");
        require(seq_id >= 0 && (uint32_t) seq_id < ctx->n_seq_max() && p0 >= 0, "sequence or position out of range");
        check_pieces(ctx, pieces, n_pieces);

        auto * mem = pruned_memory(ctx);
        check_room(ctx, mem, seq_id, p0, pieces, n_pieces);

        // whatever goes wrong from here on: nothing of the prompt stays
        const auto undo = [&](llama_context * c) {
            if (mem) {
                mem->waits.announced = {};
            }
            c->get_memory()->seq_rm(seq_id, p0, -1);
        };
        std::unique_ptr<llama_context, decltype(undo)> guard(ctx, undo);

        const int32_t res = decode_pieces(ctx, mem, seq_id, p0, pieces, n_pieces);
        if (res != 0) {
            last_error = format("st3: decoding the prompt failed with code %d", res);
            return res;
        }
        (void) guard.release();
        return res;
    });
}

// One cut's part of what a sequence's last prompt noted for each.
static int32_t
of_cut(const llama_context * ctx, llama_seq_id seq_id, st3_kept_t st3_account::*what, const char * none, int32_t i_cut,
       int32_t * out, int32_t cap) {
    return guarded(-1, [&] {
        require(ctx && (out || cap <= 0), "no context or no room for the result");
        const auto * mem     = pruned_memory(ctx);
        const auto * account = mem ? mem->account(seq_id) : nullptr;
        require(account && !(account->*what).empty(), none);

        const auto & cuts = account->*what;
        require(i_cut >= 0 && (size_t) i_cut < cuts.size(), format("there is no cut %d", i_cut));

        std::copy_n(cuts[i_cut].begin(), std::min<size_t>(cuts[i_cut].size(), std::max(0, cap)), out);
        return (int32_t) cuts[i_cut].size();
    });
}

int32_t st3_kept(const llama_context * ctx, llama_seq_id seq_id, int32_t i_cut, int32_t * out, int32_t cap) {
    return of_cut(ctx, seq_id, &st3_account::kept, "no prompt was pruned", i_cut, out, cap);
}

int32_t st3_owners(const llama_context * ctx, llama_seq_id seq_id, int32_t i_cut, int32_t * out, int32_t cap) {
    return of_cut(ctx, seq_id, &st3_account::owners, "no visual tokens were merged", i_cut, out, cap);
}

static void check_layer(const llama_context * ctx, llama_seq_id seq_id, int32_t il) {
    require(ctx && ctx->get_memory(), "no context with a KV cache");
    require(seq_id >= 0 && (uint32_t) seq_id < ctx->n_seq_max(), format("there is no sequence %d", seq_id));
    require(il >= 0 && (uint32_t) il < ctx->get_model().hparams.n_layer(), format("there is no layer %d", il));
}

// Calls fn(number, position, cell) for what a layer holds of a sequence, by place; returns how many that is.
template <typename F> static int32_t each_cell(const llama_context * ctx, llama_seq_id seq_id, int32_t il, F && fn) {
    check_layer(ctx, seq_id, il);

    const auto * mem   = pruned_memory(ctx);
    const auto * stock = dynamic_cast<const llama_kv_cache *>(ctx->get_memory());
    require(mem || stock, "this kind of memory has no positions to read");

    const llama_kv_cache & kv = mem ? mem->stage(mem->schedule.stage(il)) : *stock;

    int32_t n = 0;
    for (const auto & [place, cell] : st3_by_place(kv.get_cells(seq_id), seq_id, 0, INT32_MAX)) {
        fn(n++, place.pos, cell);
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

int32_t st3_visual(const llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t * out, int32_t cap) {
    return guarded(-1, [&] {
        require(out || cap <= 0, "no room for the result");
        check_layer(ctx, seq_id, il);

        const auto * mem = pruned_memory(ctx);
        require(mem, "memory without ST3 does not know which tokens are visual");

        int32_t n     = 0;
        int32_t first = 0;  // index of the image's first token
        for (const auto & image : mem->images.of(seq_id)) {
            for (const uint32_t id : mem->held(seq_id, image, mem->schedule.stage(il)).ids) {
                if (n++ < cap) {
                    out[n - 1] = first + (int32_t) id;
                }
            }
            first += (int32_t) image.places.size();
        }
        return n;
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

size_t st3_report(const llama_context * ctx, llama_seq_id seq_id, char * out, size_t cap) {
    return guarded(size_t(0), [&] {
        if (out && cap > 0) {
            out[0] = '\0';
        }
        require(ctx && ctx->get_memory() && (out || cap == 0), "no context or no room for the result");
        require(seq_id < (llama_seq_id) ctx->n_seq_max(), format("there is no sequence %d", seq_id));

        const std::string report = st3_make_report(*ctx, seq_id);
        if (cap > 0) {
            const size_t n = std::min(report.size(), cap - 1);
            memcpy(out, report.data(), n);
            out[n] = '\0';
        }
        return report.size();
    });
}
