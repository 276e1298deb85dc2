// st3-create.cpp - the call sites in llama_model: where metadata becomes a memory.

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "st3-memory.h"

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

// Whether the graph of an architecture calls st3_cut (docs/models.md has what each is known from).
static bool has_cuts(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_QWEN2VL:
        case LLM_ARCH_QWEN3VL:
        case LLM_ARCH_QWEN3VLMOE:
        case LLM_ARCH_MISTRAL3:
        case LLM_ARCH_PHI2:
        case LLM_ARCH_PHI3:
        case LLM_ARCH_INTERNLM2:
        case LLM_ARCH_STABLELM:
        case LLM_ARCH_MINICPM:
        case LLM_ARCH_GRANITE:
        case LLM_ARCH_GRANITE_MOE:
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_GEMMA3:
        case LLM_ARCH_CHATGLM: return true;
        default: return false;
    }
}

std::string st3_unsupported(const llama_model & model, const llama_memory_params * params) {
    if (!has_cuts(model.arch)) {
        return format("architecture %s is not among those that can be pruned", model.arch_name().c_str());
    }
    if (model.hparams.is_swa_any() &&
        !(model.arch == LLM_ARCH_GEMMA3 && model.hparams.swa_type == LLAMA_SWA_TYPE_STANDARD)) {
        return "sliding-window attention is supported with gemma3 alone";
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
