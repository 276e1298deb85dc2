#include "st3-server.h"

#include "server-task.h"
#include "st3.h"

#include <algorithm>
#include <vector>

// null where the model needs no memory, as an encoder.
static common_json report(const llama_context * ctx, llama_seq_id seq_id) {
    std::string text(8192, '\0');  // most fit: to ask for the size makes all of it once more
    size_t      n = st3_report(ctx, seq_id, text.data(), text.size());
    if (n >= text.size()) {
        text.resize(n + 1);
        n = st3_report(ctx, seq_id, text.data(), text.size());
    }
    text.resize(n);
    return text.empty() ? common_json(nullptr) : common_json::parse(text);
}

static std::vector<int32_t> kept(const llama_context * ctx, llama_seq_id seq_id, int32_t i_cut) {
    std::vector<int32_t> res((size_t) std::max(0, st3_kept(ctx, seq_id, i_cut, nullptr, 0)));
    st3_kept(ctx, seq_id, i_cut, res.data(), (int32_t) res.size());
    return res;
}

// [picture][visual token] layers that read it; null for a picture of an earlier prompt.
static common_json layers_of(const llama_context * ctx, llama_seq_id seq_id, const common_json & st3) {
    const auto cuts    = st3.at("cuts").get<std::vector<int>>();
    const int  n_layer = (int) st3.at("per_layer").size();

    std::vector<std::vector<int32_t>> of_cuts;
    for (size_t i = 0; i < cuts.size(); ++i) {
        of_cuts.push_back(kept(ctx, seq_id, (int32_t) i));
    }
    common_json res = common_json::array();
    for (size_t k = 0; k < st3.at("images").size(); ++k) {
        const auto & from = st3.at("kept_from").at(k);
        if (from.is_null()) {
            res.push_back(nullptr);
            continue;
        }
        const int n     = st3.at("images").at(k).at("n").get<int>();
        const int first = from.get<int>();

        // a cut is after its layer; who is kept by it is read up to the next one
        std::vector<int> layers((size_t) n, cuts.empty() ? n_layer : cuts[0] + 1);
        for (size_t i = 0; i < cuts.size(); ++i) {
            for (const int32_t token : of_cuts[i]) {
                if (token >= first && token < first + n) {
                    layers[(size_t) (token - first)] = i + 1 < cuts.size() ? cuts[i + 1] + 1 : n_layer;
                }
            }
        }
        res.push_back(layers);
    }
    return res;
}

static std::string line_of(const common_json & st3) {
    if (st3.is_null()) {
        return "off";
    }
    std::string reason;
    if (!st3.at("reason").is_null()) {
        const std::string text = st3.at("reason");
        reason                 = " (" + text + ")";
    }
    const std::string preset = st3.at("preset");
    if (preset == "off") {
        return preset + reason;
    }
    const int given = st3.at("given").get<int>();
    if (given == 0) {
        return "no picture";
    }
    const std::string mode = st3.at("mode");
    return mode + ": " + std::to_string(given) + " visual tokens, " +
           std::to_string((int) (100 * st3.at("budget").get<double>() + 0.5)) + " % kept on average" + reason;
}

common_json st3_of_slot(const llama_context * ctx, llama_seq_id seq_id, std::string & line) {
    common_json res = report(ctx, seq_id);
    line            = line_of(res);
    if (res.is_null() || res.at("given").get<int>() == 0) {
        return nullptr;
    }
    const std::string mode = res.at("mode");
    res["layers"]          = mode == "pruned-prefill" ? layers_of(ctx, seq_id, res) : common_json(nullptr);
    return res;
}

bool st3_holds_all(const llama_context * ctx) { return st3_visual(ctx, 0, 0, nullptr, 0) >= 0; }

common_json st3_of_model(const llama_context * ctx) {
    common_json res = report(ctx, -1);
    if (res.is_null()) {
        return nullptr;
    }
    const std::string preset = res.at("preset");
    return preset == "off" && res.at("reason").is_null() ? common_json(nullptr) : res;
}

common_json st3_beside_timings(common_json answer, const common_json & st3) {
    if (st3.is_null() || answer.empty()) {
        return answer;
    }
    common_json * place = answer.is_array() ? &answer.back() : &answer;
    if (place->contains("data")) {  // an event of a stream
        place = &place->at("data");
    }
    (*place)["st3"] = st3;
    return answer;
}

json server_task_result_cmpl_final::to_json() {
    const bool chosen =
            response_fields.empty() || std::count(response_fields.begin(), response_fields.end(), "st3") > 0;
    return st3_beside_timings(to_json_plain(), chosen ? st3 : common_json(nullptr));
}
