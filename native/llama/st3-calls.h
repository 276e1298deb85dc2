// st3-calls.h - what llama.cpp's sources call; llama-graph.h includes it. Each does nothing unless the memory is an st3_memory.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>

struct ggml_tensor;
struct llama_context;
struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;
struct llama_model_kv_override;
struct llm_graph_context;
class llm_graph_input_attn_kv;
class llm_graph_input_attn_kv_iswa;

//
// llama_model
//

// In load_hparams: st3.* overrides join the metadata, where llama_model_meta_val_str sees them too.
void st3_merge_overrides(
        const std::unordered_map<std::string, llama_model_kv_override> & overrides,
        std::unordered_map<std::string, std::string> &                   meta);

// In create_memory: the memory of a model with a schedule, or null for the stock one. Throws std::invalid_argument when the st3.*
// metadata is unusable.
llama_memory_i *
st3_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

//
// llm_graph_context
//

// In build_attn_inp_kv: the attention inputs of all stages, or null for the stock ones.
llm_graph_input_attn_kv * st3_build_attn_inp(const llm_graph_context & g);

// The same in build_attn_inp_kv_iswa; and in build_attn, what it goes on with, or null for the stock one.
llm_graph_input_attn_kv_iswa * st3_build_attn_inp_iswa(const llm_graph_context & g);
llm_graph_input_attn_kv *      st3_inp_of(llm_graph_input_attn_kv_iswa * inp);

// In build_attn: the inputs of the stage that layer il belongs to.
llm_graph_input_attn_kv * st3_stage_inp(llm_graph_input_attn_kv * inp, int il);

// In build_attn, once the layer's keys are in the cache: records the attention that visual tokens get.
//   q [d, n_head, n_rows] F32, k [d, n_head_kv, n_kv], kq_mask [n_kv, n_rows]
void st3_record_attention(
        const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il);

// At the end of a layer: drops visual tokens where the schedule cuts. Returns the rows that go on, of cur F32 [n_embd, n_rows];
// inp_pos I32 [n_rows], null where there is none, *inp_scale F32 [1, 1, n_rows], which layers read by row as well, and g.n_tokens
// follow.
ggml_tensor *
st3_cut(llm_graph_context & g, ggml_tensor * cur, ggml_tensor *& inp_pos, int il, ggml_tensor ** inp_scale = nullptr);

// In build_inp_out_ids: the output rows as the last stage numbers them, or null for the stock ones.
ggml_tensor * st3_build_inp_out_ids(const llm_graph_context & g);

// In build_ffn: the feed-forward network of many rows, F32 [n_embd, n_rows], by `build` in parts of them, so that its large
// middle exists for few rows at a time; null where all of them go at once, as in stock.
ggml_tensor * st3_ffn_in_parts(
        const llm_graph_context & g, ggml_tensor * cur, const std::function<ggml_tensor *(ggml_tensor *)> & build);

//
// llama_context
//

// Where a context has made its memory.
void st3_belongs_to(llama_memory_i * memory, llama_context * ctx);

// In graph_max_nodes: nodes that ST3 may add to a graph of n_tokens.
uint32_t st3_graph_extra_nodes(const llama_memory_i * memory, uint32_t n_tokens);

// In sched_reserve: output rows of a ubatch to have memory for beforehand, of at most n_outputs. With ST3 ubatches are as long as
// prompts, of which the last row alone is wanted; a ubatch with more outputs gets more memory when it comes.
uint32_t st3_outputs_to_reserve(const llama_memory_i * memory, const llama_cparams & cparams, uint32_t n_outputs);

// Where adapters change: computes what waits, as it was to be computed without them.
void st3_compute_waiting(llama_context & ctx);
