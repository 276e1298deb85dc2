// st3-vision.h - the call site in clip.cpp: the vision encoder's graph, and what is made of it.
#pragma once

struct clip_graph;
struct ggml_cgraph;

// Builds the graph. If bf16 is true and the CPU multiplies BF16 fast (st3-bf16.h), products of weights, with the bias and
// the activation that follow, and attention without a mask become ops that compute in BF16. Everything else stays as it is.
ggml_cgraph * st3_vision_build(clip_graph & builder, bool bf16);

// What the op of an attention is called, for st3_stop_encode.
constexpr char ST3_VISION_ATTENTION[] = "st3_vision_attention";
