#include "st3-llava.h"

#include "gguf.h"

#include <cstring>
#include <memory>

bool st3_is_llava(const std::string & mmproj) {
    if (mmproj.empty()) {
        return false;
    }
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> file(
            gguf_init_from_file(mmproj.c_str(), { /*no_alloc =*/true, /*ctx =*/nullptr }), gguf_free);
    if (!file) {
        return false;
    }
    const auto find = [&](const char * name) { return gguf_find_key(file.get(), name); };

    const int64_t key = find("clip.projector_type");
    if (key < 0) {  // LLaVA's, if it is from before there was the key
        return find("clip.vision.projector_type") < 0 && find("clip.audio.projector_type") < 0;
    }
    return gguf_get_kv_type(file.get(), key) == GGUF_TYPE_STRING &&
           strcmp(gguf_get_val_str(file.get(), key), "mlp") == 0;
}

void st3_llava_layout(common_json & content) {
    common_json res = common_json::array();
    for (const bool pictures : { true, false }) {
        for (const auto & part : content) {
            const std::string type = part.value("type", "");
            if ((type == "media_marker") != pictures) {
                continue;
            }
            common_json moved = part;
            if (pictures) {
                const std::string marker = part.at("text");
                moved["text"]            = marker + "\n";
            }
            res.push_back(moved);
        }
    }
    content = res;
}
