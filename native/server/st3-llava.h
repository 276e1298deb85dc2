// st3-llava.h - a message as LLaVA was trained to read it.
#pragma once

#include "json.h"

#include <string>

// Whether the vision half (mmproj) in a file is LLaVA's: false where there is none.
bool st3_is_llava(const std::string & mmproj);

// The parts of a message as LLaVA was trained: pictures first, a new line after each.
void st3_llava_layout(common_json & content);
