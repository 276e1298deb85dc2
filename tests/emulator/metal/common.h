// common.h - stands in for upstream's file of this name.
#pragma once

#include <metal_stdlib>

using namespace metal;
