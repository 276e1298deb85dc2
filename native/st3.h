// st3.h - the public C boundary of st3-edge: visual token pruning (ST3, arXiv 2412.20105) inside libllama.
//
// A model runs with ST3 when its GGUF metadata (or llama_model_params.kv_overrides) holds `st3.*` keys, read once
// when a context is created. Every key is optional; st3.preset = "off", or no st3 key at all, is stock llama.cpp.
//
//   st3.preset    str   "off" "st3" "pvtp" "paper" "fastv" "pyramiddrop" "vtw" "random" "downsample": defaults of the rest
//   st3.budget    f32   (0, 1]: mean over layers of visual tokens kept / given; `keep` is solved from it
//   st3.start     u32   [1, n_layer): the first cut is after layer start - 1
//   st3.stride    u32   >= 1: one cut every `stride` layers after that, while a layer follows
//   st3.keep      f32   [0, 1]: share of an image's visual tokens that a cut keeps (excludes st3.budget)
//   st3.min_keep  u32   >= 0: cuts and annealing leave an image at least this many tokens (or all it has)
//   st3.min_share f32   [0, 1]: and at least this share of those given
//   st3.score     str   terms joined by '+', each <last|text>-<mean|max>[-sum]; a score is the mean of its terms
//                       last|text: the scoring queries are the last prompt token | the prompt text after the last image
//                       (at most its last 512 tokens, and where the prompt is not pruned in one ubatch, the last ubatch's)
//                       mean|max:  how heads and queries are reduced; -sum: averaged over all layers up to the cut
//   st3.coverage  f32   [0, 1]: share of the kept tokens that is chosen evenly over the picture, whatever their score
//   st3.merge     bool  a kept token stands for the dropped ones that are most like it: it becomes their weighted mean, and
//                       log(how many they are) is added to its column of the attention mask; tokens that leave while the answer
//                       grows are then stood for as well, and what stays keeps its keys and values
//   st3.rank      str   "score" | "distance": by the score, or by the score times 1 - the largest cosine to a token of a
//                       higher score
//   st3.seed      u32   seed of what is chosen at random
//
//   While the answer grows (visual token annealing), each stage's visual tokens fall to a share a(t) of what it held after
//   prefill, t generated tokens later:
//   st3.anneal           str  "none" "linear" "cosine" "exponential": how a(t) falls from 1 to anneal_floor
//   st3.anneal_tokens    u32  >= 1: over so many generated tokens
//   st3.anneal_floor     f32  [0, 1] (exponential: above 0)
//   st3.anneal_interval  u32  >= 1: cells are freed every so many generated tokens
//   st3.anneal_score     str  as st3.score (-sum: averaged over the layers of the stage, else its last layer), or "random";
//                             st3.score if not given
//
//   st3.vision_type  str  "auto": the vision encoder's products and attention are computed in the type that the CPU multiplies
//                         fastest (AVX512-BF16: BF16; AVX-512, AVX2: F32), whatever its file has; "file": as stock does. Read
//                         when mtmd loads it for this model; GPUs and other CPUs compute as stock. "auto" if not given
//
// Integer keys may be given as any integer GGUF type, real keys as f32 or f64 or integer, bool as bool or as the string
// "true" or "false".
#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ST3_ABI_VERSION 10

// A run of prompt tokens: text, or one image.
// Exactly one of tokens and embd is set. For an image, embd is F32 [n][llama_model_n_embd_inp], and nx * ny == n gives its patch
// grid, row by row (nx == ny == 0: unknown, the tokens count as one row).
// pos, for an image of a model with M-RoPE: [n][4] where its tokens are, as mtmd_image_tokens_get_decoder_pos says (t, y, x, z),
// and how many positions it takes, as mtmd_input_chunk_get_n_pos says. NULL: by its grid, as Qwen-VL has it.
// non_causal: the image's tokens see each other, as mtmd_decode_use_non_causal says.
struct st3_piece {
    const llama_token * tokens;
    const float *       embd;
    int32_t             n;
    int32_t             nx;
    int32_t             ny;
    const llama_pos *   pos;
    int32_t             n_pos;
    bool                non_causal;
};

// ABI of this header; the Python package refuses any other.
LLAMA_API int32_t st3_abi_version(void);

// What went wrong in this thread's last st3_* call; "" if nothing did.
LLAMA_API const char * st3_last_error(void);

// Whether a device has a kernel of ours for the attention that keys of that type and head size receive
// (native/ggml/attn-span.h); where it has none, stock ops compute the same there. Asks nothing of the device itself.
LLAMA_API bool st3_device_has_kernel(ggml_backend_dev_t device, enum ggml_type type_k, int32_t head_size);

// Checks the st3.* metadata of a model against its shape, as llama_init_from_model will.
// Returns 0, or -1 with st3_last_error() set (llama_init_from_model then fails with the same message).
LLAMA_API int32_t st3_check_model(const struct llama_model * model);

// Whether st3.vision_type is "auto" for the vision encoder that is loaded for a text model: false without st3.* keys, with
// st3.preset = "off", or where they are not valid.
LLAMA_API bool st3_vision_fast(const struct llama_model * model);

// Multiplications and additions of a model's decoder, counted as two, for n_rows positions after n_before others: all of them
// computed, weights and attention, one row of logits. -1 for bad arguments.
LLAMA_API double st3_prefill_flops(const struct llama_model * model, int32_t n_rows, int32_t n_before);

// Says that the next n embeddings given to llama_decode are the tokens of one image, of a patch grid nx * ny == n, row by row
// (nx == ny == 0: unknown, a square where n is one and else a row); n == 0: that they are no image (audio). Embeddings that
// nobody announced are none either, and never pruned. mtmd's helper announces its images. picture (NULL or "": none) names the
// picture that they are of: tiles of one picture, one right after the other, are one image, with one quota.
//
// An announced image of one sequence, asked for no outputs, waits: llama_decode returns 0, its positions count as decoded, and
// it is computed as one pruned prompt together with the tokens that ask for an output, so both must fit n_batch (n_ubatch is
// not the limit). Text without outputs that comes right before or after it waits as well. Everything else that comes for the
// sequence has what waits computed first, as it came: its visual tokens are then removed after the question (evict-only).
// What waits is lost by no error: trying again gives the same.
//
// A pruned prompt whose question is taken back, or a part of it (llama_memory_seq_rm up to the sequence's end), waits again, so
// that another question chooses other tokens, and the same one gives the same answer. For that its embeddings are kept.
LLAMA_API void st3_announce_image(struct llama_context * ctx, int32_t n, int32_t nx, int32_t ny, const char * picture);

// Prefills pieces into sequence seq_id from position p0 on, where the sequence ends (0 if it is empty; with M-RoPE at or after
// its end); logits of the last position are then llama_get_logits_ith(-1). The last piece must be text. A piece takes n positions,
// but with M-RoPE an image n_pos, and without pos, of a known grid, max(nx, ny), as mtmd counts them: its tokens share position p
// and are told apart by (p, p + y, p + x). An image whose tokens see each other must fit n_ubatch.
// The same as announcing images and giving all pieces to llama_decode, in batches of n_batch; but the embeddings are not kept.
// Returns 0, a positive or negative llama_decode() code, or -100 for unusable arguments or a prompt that does not fit the
// context (nothing decoded, st3_last_error() set). When decoding fails, none of the pieces' positions stay in the cache.
LLAMA_API int32_t st3_prefill(
        struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0, const struct st3_piece * pieces,
        size_t n_pieces);

// As llama_sampler_sample with samplers of the CPU, but where no token may follow (a grammar that this vocabulary cannot go on
// with) it returns LLAMA_TOKEN_NULL, with nothing accepted, where that ends the program; st3_last_error() says why.
LLAMA_API llama_token st3_sample(struct llama_sampler * sampler, struct llama_context * ctx, int32_t i);

// The visual indices kept after cut i_cut of a sequence's last prompt (seq_id < 0: of the sequence that had the last one),
// ascending, over all its images in order (the second image's first token has the index "tokens of the first"). Writes at most
// cap of them to out, and returns how many there are; -1 if there is no such cut or no image was pruned in the compute.
LLAMA_API int32_t
st3_kept(const struct llama_context * ctx, llama_seq_id seq_id, int32_t i_cut, int32_t * out, int32_t cap);

// Beside it, where tokens were merged: the index of the token that stands for each visual token of that prompt after cut
// i_cut, itself where it was kept; -1 where none does. Returns how many visual tokens the prompt had; -1 where st3_kept does,
// or nothing was merged.
LLAMA_API int32_t
st3_owners(const struct llama_context * ctx, llama_seq_id seq_id, int32_t i_cut, int32_t * out, int32_t cap);

// Visual tokens of sequence seq_id that layer il holds now, as indices over all images of the sequence in order, ascending.
// Writes at most cap of them to out, and returns how many there are; -1 for bad arguments and memory without ST3.
LLAMA_API int32_t
st3_visual(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t * out, int32_t cap);

// Positions of sequence seq_id, text and visual, that layer il holds now, ascending; with M-RoPE the tokens of an image have the
// same one, and are in order. Writes at most cap of them to out, and
// returns how many there are; -1 for bad arguments.
LLAMA_API int32_t
st3_positions(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, llama_pos * out, int32_t cap);

// How many tokens each of those positions stands for in layer il, text 1, in the same order. Returns as st3_positions does.
LLAMA_API int32_t
st3_weights(const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, float * out, int32_t cap);

// Writes a JSON object about a sequence (seq_id < 0: the one that had the last prompt), NUL-terminated and cut at cap bytes, and
// returns its full length without the NUL:
// {"mode": "off"|"pruned-prefill"|"evict-only", "reason": str|null,    of its images; off: nothing dropped; evict-only: some
//                                             were computed in full in all layers, and cells removed afterwards, for that reason
//  "preset": str, "start": int, "stride": int, "keep": float, "min_keep": int, "min_share": float,
//  "score": str, "coverage": float, "merge": bool, "rank": str,
//  "cuts": [layer], "counts": [[kept of each image, in order] for each cut],
//  "budget": float,                                 mean over layers of kept / given for them (schedule's own if none)
//  "anneal": {"curve": str, "tokens": int, "floor": float, "interval": int, "score": str},
//  "given": int, "images": [{"n": visual tokens, "nx", "ny": patch grid}],
//  "kept_from": [int|null],                         of each image, the index of its first token in st3_kept(); null: of another prompt
//  "per_layer": [visual tokens that each layer held after their prompts], "held": [that it holds now],
//  "waiting": int,                                  positions that wait to be computed
//  "embedding_bytes": int,                          of all images of the context that wait or may have to be read again
//  "kv_bytes": {"allocated": int, "live": int, "full": int},   now; live: cells in use; full: what stock would have in use
//  "flops": {"prefill": int, "prefill_full": int}}  of its last prompt; multiply and add counted as 2; weights and attention of
//                                                   the decoder
LLAMA_API size_t st3_report(const struct llama_context * ctx, llama_seq_id seq_id, char * out, size_t cap);

// Callbacks that end work when another thread sets a flag: their last argument is a const bool *.
// For llama_context_params.abort_callback: the llama_decode under way then returns 2.
LLAMA_API bool st3_stop_compute(void * flag);

// For the progress_callback of llama_model_params and mtmd_context_params: nothing is loaded then.
LLAMA_API bool st3_stop_load(float progress, void * flag);

// For mtmd_context_params.cb_eval: mtmd_encode_chunk then returns 0 with no embeddings of use.
LLAMA_API bool st3_stop_encode(struct ggml_tensor * t, bool ask, void * flag);

#ifdef __cplusplus
}
#endif
