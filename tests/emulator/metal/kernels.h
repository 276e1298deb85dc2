// kernels.h - the kernels of attn_span.metal by their host names.
#pragma once

#include <map>
#include <string>

// buffers: by index, 0 being the arguments; shared: threadgroup memory
using metal_kernel = void (*)(void ** buffers, void * shared, int x, int y, int z, int warp, int lane);

extern const std::map<std::string, metal_kernel> metal_kernels;
