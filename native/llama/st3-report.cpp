#include "st3-report.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-memory.h"

#include <algorithm>
#include <cmath>
#include <locale>
#include <numeric>
#include <sstream>

namespace {

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

size_t cell_bytes(const llama_kv_cache & kv, const llama_hparams & hparams, int32_t il) {
    const size_t k = ggml_row_size(kv.type_k(), hparams.n_embd_k_gqa(il));
    // latent attention has no values beside its keys
    return hparams.is_mla() ? k : k + ggml_row_size(kv.type_v(), hparams.n_embd_v_gqa(il));
}

kv_bytes count_kv_bytes(const llama_context & ctx) {
    const auto & hparams = ctx.get_model().hparams;
    kv_bytes     res;

    for (const auto & [buft, size] : ctx.get_memory()->memory_breakdown()) {
        res.allocated += size;
    }
    const auto * pruned = dynamic_cast<const st3_memory *>(ctx.get_memory());
    const auto * stock  = dynamic_cast<const llama_kv_cache *>(ctx.get_memory());
    if (pruned || stock) {
        const llama_kv_cache & first = pruned ? pruned->stage(0) : *stock;

        size_t n_full = cells_used(first);
        for (llama_seq_id id = 0; pruned && id < (llama_seq_id) pruned->n_seq_max; ++id) {
            for (const auto & image : pruned->images.of(id)) {
                n_full += image.n_there() - pruned->n_held(id, image, 0);
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

// Multiplications and additions of the decoder for rows[il] rows of layer il with pairs[il] of (query, key), and one output row.
double count_flops(const llama_model & model, const std::vector<double> & rows, const std::vector<double> & pairs) {
    const auto & hparams = model.hparams;

    double res = rows[0] > 0 ? 2.0 * hparams.n_embd * model.vocab.n_tokens() : 0.0;
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
        res += 2.0 * pairs[il] * hparams.n_head(il) * (hparams.n_embd_head_k(il) + hparams.n_embd_head_v(il));
    }
    return res;
}

// What became of a sequence's images.
struct fate_t {
    const char *                       mode  = "off";
    uint32_t                           given = 0;
    std::vector<std::vector<uint32_t>> counts;     // [cut][image]
    std::vector<uint32_t>              per_layer;  // visual tokens held after their prompts
    std::vector<uint32_t>              held;       // and now
    std::vector<std::string>           images;     // as JSON
    std::vector<std::string>           kept_from;  // the same
};

fate_t look_at_images(const st3_memory & mem, llama_seq_id seq_id) {
    const auto & s = mem.schedule;

    fate_t res;
    res.counts.resize(s.cuts.size());
    res.per_layer.assign(s.n_layer, 0);
    res.held.assign(s.n_layer, 0);

    const auto * account = mem.account(seq_id);

    bool pruned  = false;
    bool evicted = false;
    for (const auto & image : mem.images.of(seq_id)) {
        const auto n = (uint32_t) image.places.size();
        res.given += n;
        res.images.push_back(format("{\"n\": %u, \"nx\": %u, \"ny\": %u}", n, image.nx, image.ny));
        const bool last = account && account->first.count(image.number);
        res.kept_from.push_back(last ? std::to_string(account->first.at(image.number)) : "null");
        pruned |= image.pruned;
        evicted |= image.evicted;
        for (size_t c = 0; c < s.cuts.size(); ++c) {
            res.counts[c].push_back(image.pruned ? image.n0[c + 1] : n);
        }
        for (uint32_t il = 0; il < s.n_layer; ++il) {
            const uint32_t stage = s.stage((int32_t) il);
            const uint32_t held  = mem.n_held(seq_id, image, stage);
            res.held[il] += held;
            res.per_layer[il] += image.pruned ? image.n0[stage] : held;
        }
    }
    res.mode = evicted ? "evict-only" : pruned ? "pruned-prefill" : "off";
    return res;
}

}  // namespace

double st3_flops(const llama_model & model, double n_rows, double n_before) {
    const uint32_t n_layer = model.hparams.n_layer();
    return count_flops(
            model, std::vector<double>(n_layer, n_rows),
            std::vector<double>(n_layer, n_rows * n_before + n_rows * (n_rows + 1) / 2));
}

std::string st3_make_report(const llama_context & ctx, llama_seq_id seq_id) {
    const auto &   model   = ctx.get_model();
    const auto *   mem     = dynamic_cast<const st3_memory *>(ctx.get_memory());
    const uint32_t n_layer = model.hparams.n_layer();

    st3_schedule off;
    off.n_layer = n_layer;

    const st3_schedule & s = mem ? mem->schedule : off;

    fate_t      fate;
    std::string reason;
    if (mem) {
        seq_id               = seq_id < 0 ? mem->last_asked() : seq_id;
        fate                 = look_at_images(*mem, seq_id);
        const auto * account = mem->account(seq_id);
        if (fate.given == 0) {
            reason = "the prompt has no image";
        } else if (account && fate.mode != std::string("pruned-prefill")) {
            reason = account->reason;
        }
    } else {
        fate.per_layer.assign(n_layer, 0);
        fate.held = fate.per_layer;
        if (!st3_make_schedule(model.gguf_kv, n_layer).off()) {
            reason = st3_unsupported(model, nullptr);
        }
    }

    const double kept   = std::accumulate(fate.per_layer.begin(), fate.per_layer.end(), 0.0);
    const double budget = fate.given ? kept / fate.given / n_layer : s.budget();

    std::vector<std::string> counts;
    for (const auto & of_cut : fate.counts) {
        counts.push_back(list(of_cut));
    }

    std::vector<double> rows(n_layer, 0);
    std::vector<double> pairs(n_layer, 0);
    std::vector<double> rows_full(n_layer, 0);
    std::vector<double> pairs_full(n_layer, 0);
    if (const auto * account = mem ? mem->account(seq_id) : nullptr; account && !account->rows.empty()) {
        for (uint32_t il = 0; il < n_layer; ++il) {
            rows[il]  = (double) account->rows[s.stage((int32_t) il)];
            pairs[il] = account->pairs[s.stage((int32_t) il)];
        }
        rows_full.assign(n_layer, account->n_rows);
        pairs_full.assign(n_layer, account->pairs_full);
    }

    const kv_bytes kv     = count_kv_bytes(ctx);
    const auto *   prompt = mem ? mem->waits.of(seq_id) : nullptr;

    std::ostringstream ss;
    ss.imbue(std::locale::classic());  // JSON, whatever the program's is
    ss.precision(9);
    ss << "{\"mode\": \"" << fate.mode << "\", \"reason\": " << (reason.empty() ? "null" : quote(reason))
       << ", \"preset\": " << quote(s.preset) << ", \"start\": " << s.start << ", \"stride\": " << s.stride
       << ", \"keep\": " << s.keep << ", \"min_keep\": " << s.min_keep << ", \"min_share\": " << s.min_share
       << ", \"score\": " << quote(s.score) << ", \"coverage\": " << s.coverage
       << ", \"merge\": " << (s.merge ? "true" : "false") << ", \"rank\": " << quote(s.rank_name())
       << ", \"cuts\": " << list(s.cuts) << ", \"counts\": " << list(counts) << ", \"budget\": " << budget
       << ", \"anneal\": {\"curve\": " << quote(s.curve_name()) << ", \"tokens\": " << s.anneal_tokens
       << ", \"floor\": " << s.anneal_floor << ", \"interval\": " << s.anneal_interval
       << ", \"score\": " << quote(s.anneal_score) << "}, \"given\": " << fate.given
       << ", \"images\": " << list(fate.images) << ", \"kept_from\": " << list(fate.kept_from)
       << ", \"per_layer\": " << list(fate.per_layer) << ", \"held\": " << list(fate.held)
       << ", \"waiting\": " << (prompt ? prompt->n_rows() : 0)
       << ", \"embedding_bytes\": " << (mem ? mem->waits.n_bytes() : 0)
       << ", \"kv_bytes\": {\"allocated\": " << kv.allocated << ", \"live\": " << kv.live << ", \"full\": " << kv.full
       << "}";
    ss.precision(0);
    ss << std::fixed << ", \"flops\": {\"prefill\": " << count_flops(model, rows, pairs)
       << ", \"prefill_full\": " << count_flops(model, rows_full, pairs_full) << "}}";
    return ss.str();
}
