// st3-create.cpp - the call sites in llama_model: where metadata becomes a memory.

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-memory.h"

#include <algorithm>

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
    const auto cut_in = { LLM_ARCH_LLAMA, LLM_ARCH_QWEN2VL, LLM_ARCH_QWEN3VL, LLM_ARCH_QWEN3VLMOE };
    if (std::count(cut_in.begin(), cut_in.end(), model.arch) == 0) {
        return format("architecture %s is not supported yet", model.arch_name().c_str());
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
