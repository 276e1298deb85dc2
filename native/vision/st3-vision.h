// st3-vision.h - the call site in clip.cpp: the vision encoder's graph, and what is made of it.
#pragma once

struct clip_graph;
struct ggml_cgraph;

// Builds the graph. If fast is true and there are kernels for this CPU (st3-kernels.h), products with weights, the bias and the
// activation that follow them, and attention without a mask become ops of ours. Everything else stays as it is.
ggml_cgraph * st3_vision_build(clip_graph & builder, bool fast);

// What the op of an attention is called, for st3_stop_encode.
constexpr char ST3_VISION_ATTENTION[] = "st3_vision_attention";
