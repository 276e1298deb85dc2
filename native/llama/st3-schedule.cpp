#include "st3-schedule.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <locale>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>

namespace {

using meta_map = std::unordered_map<std::string, std::string>;

const char * const KEYS[] = {
    "st3.preset",          "st3.budget",       "st3.start",       "st3.stride",        "st3.keep",
    "st3.min_keep",        "st3.min_share",    "st3.score",       "st3.coverage",      "st3.seed",
    "st3.merge",           "st3.rank",         "st3.anneal",      "st3.anneal_tokens", "st3.anneal_floor",
    "st3.anneal_interval", "st3.anneal_score", "st3.vision_type",
};

const char * const RANKS[]        = { "score", "distance" };                        // as st3_schedule::distance
const char * const VISION_TYPES[] = { "file", "auto" };                             // as st3_schedule::vision_fast
const char * const CURVES[]       = { "none", "linear", "cosine", "exponential" };  // as st3_curve

// A preset is a set of defaults. start and stride are fractions of the layers where they are at most 1.
struct preset {
    const char * name;
    double       start;
    double       stride;
    double       keep;  // < 0: solved from the budget
    uint32_t     min_keep;
    bool         sure;  // of a min_share, where a budget is given and there are several cuts
    const char * score;
    double       coverage;
    bool         random;
    bool         merge;
    bool         distance;
    st3_curve    anneal;
};

constexpr double DEFAULT_BUDGET = 0.50;
constexpr double NO_MORE        = 1.0;   // a stride of all layers: one cut only
constexpr double ONE_LAYER      = 1e-9;  // as start: the first layer alone; as stride: a cut after each

const char * const DEFAULT_SCORE = "text-mean";

constexpr uint32_t DEFAULT_ANNEAL_TOKENS = 64;
constexpr double   DEFAULT_ANNEAL_FLOOR  = 0.5;

const preset PRESETS[] = {
  // name          start    stride   keep  min  least score            coverage  random  merge  distance anneal
    {"st3",          ONE_LAYER, NO_MORE,   -1.0, 1, true,  DEFAULT_SCORE, 0.0, false, true,  true,  ST3_CURVE_LINEAR},
    { "pvtp",        ONE_LAYER, NO_MORE,   -1.0, 1, true,  DEFAULT_SCORE, 0.0, false, true,  true,  ST3_CURVE_NONE  },
    { "paper",       3,         ONE_LAYER, -1.0, 1, false, "last-mean",   0.0, false, false, false, ST3_CURVE_LINEAR},
    { "fastv",       3,         NO_MORE,   0.5,  1, false, "last-mean",   0.0, false, false, false, ST3_CURVE_NONE  },
    { "pyramiddrop", 0.25,      0.25,      0.5,  1, false, "last-mean",   0.0, false, false, false, ST3_CURVE_NONE  },
    { "vtw",         0.5,       NO_MORE,   0.0,  0, false, "last-mean",   0.0, false, false, false, ST3_CURVE_NONE  },
    { "random",      ONE_LAYER, NO_MORE,   -1.0, 1, true,  "",            0.0, true,  false, false, ST3_CURVE_NONE  },
    { "downsample",  ONE_LAYER, NO_MORE,   -1.0, 1, true,  DEFAULT_SCORE, 1.0, false, false, false, ST3_CURVE_NONE  },
};

[[noreturn]] void fail(const std::string & what) { throw std::invalid_argument("st3: " + what); }

bool get_number(const meta_map & meta, const std::string & key, double min, double max, double & out) {
    const auto it = meta.find(key);
    if (it == meta.end()) {
        return false;
    }
    const char * begin = it->second.c_str();
    char *       end   = nullptr;
    const double x     = std::strtod(begin, &end);
    if (end == begin || *end != '\0' || !(x >= min && x <= max)) {
        std::ostringstream ss;
        ss.imbue(std::locale::classic());
        ss.precision(10);
        ss << key << " = " << it->second << " is not a number in ";
        min == std::numeric_limits<double>::min() ? ss << "(0" : ss << "[" << min;
        ss << ", " << max << "]";
        fail(ss.str());
    }
    out = x;
    return true;
}

bool get_count(const meta_map & meta, const std::string & key, uint32_t min, uint32_t max, uint32_t & out) {
    double x = 0;
    if (!get_number(meta, key, min, max, x)) {
        return false;
    }
    if (x != std::floor(x)) {
        fail(key + " = " + meta.at(key) + " is not a whole number");
    }
    out = (uint32_t) x;
    return true;
}

void get_flag(const meta_map & meta, const std::string & key, bool & out) {
    const auto it = meta.find(key);
    if (it == meta.end()) {
        return;
    }
    if (it->second != "true" && it->second != "false") {
        fail(key + " = " + it->second + " is neither true nor false");
    }
    out = it->second == "true";
}

// The place of a key's value among names; `out` stays where there is no such key.
template <size_t N>
void get_name(const meta_map & meta, const std::string & key, const char * const (&names)[N], size_t & out) {
    const auto it = meta.find(key);
    if (it == meta.end()) {
        return;
    }
    out = std::find(std::begin(names), std::end(names), it->second) - std::begin(names);
    if (out == N) {
        std::string list;
        for (const char * name : names) {
            list += (list.empty() ? "" : ", ") + std::string(name);
        }
        fail("unknown " + key + " '" + it->second + "' (" + list + ")");
    }
}

std::vector<st3_score_term> parse_score(const std::string & key, const std::string & text) {
    std::vector<st3_score_term> terms;

    for (size_t i = 0; i <= text.size();) {
        const size_t      end  = std::min(text.find('+', i), text.size());
        const std::string term = text.substr(i, end - i);

        bool known = false;
        for (int bits = 0; bits < 8 && !known; ++bits) {
            const st3_score_term t = { (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0 };
            if (term == std::string(t.text ? "text" : "last") + (t.max ? "-max" : "-mean") + (t.sum ? "-sum" : "")) {
                terms.push_back(t);
                known = true;
            }
        }
        if (!known) {
            fail(key + ": '" + term + "' is not <last|text>-<mean|max>[-sum]");
        }
        i = end + 1;
    }
    return terms;
}

std::vector<int32_t> cut_layers(uint32_t start, uint32_t stride, uint32_t n_layer) {
    std::vector<int32_t> cuts;
    for (uint64_t il = start - 1; il + 1 < n_layer; il += stride) {
        cuts.push_back((int32_t) il);
    }
    return cuts;
}

// Mean over layers of the share of tokens left when every cut keeps `keep`, before rounding to whole tokens.
double mean_share(const st3_schedule & s, double keep) {
    double sum   = 0;
    double share = 1;
    for (uint32_t il = 0; il < s.n_layer; ++il) {
        sum += share;
        if (std::binary_search(s.cuts.begin(), s.cuts.end(), (int32_t) il)) {
            share = std::min(share, std::max(share * keep, s.min_share));
        }
    }
    return sum / s.n_layer;
}

double solve_keep(const st3_schedule & s, double budget) {
    if (budget < mean_share(s, 0.0)) {
        fail("st3.budget = " + std::to_string(budget) + " is out of reach: " + std::to_string(s.start) + " of " +
             std::to_string(s.n_layer) + " layers run before the first cut" +
             (s.min_share > 0 ? ", and the others keep st3.min_share = " + std::to_string(s.min_share) : "") +
             " (lower st3.start" + (s.min_share > 0 ? " or st3.min_share)" : ")"));
    }
    double lo = 0.0;
    double hi = 1.0;
    for (int i = 0; i < 60; ++i) {
        const double mid                        = (lo + hi) / 2;
        (mean_share(s, mid) < budget ? lo : hi) = mid;
    }
    return (lo + hi) / 2;
}

// Of the mean share over the layers after the first cut: a half, or up to three quarters where that is little.
double default_min_share(double mean) { return std::max(mean / 2, std::min(mean * 3 / 4, 0.03)); }

uint32_t round_half_up(double x) { return (uint32_t) std::floor(x + 0.5); }

void read_anneal(const meta_map & meta, const preset & p, st3_schedule & s) {
    s.anneal        = p.anneal;
    s.anneal_tokens = DEFAULT_ANNEAL_TOKENS;
    s.anneal_floor  = DEFAULT_ANNEAL_FLOOR;
    s.anneal_score  = s.random ? "random" : s.score;

    size_t curve = s.anneal;
    get_name(meta, "st3.anneal", CURVES, curve);
    s.anneal = (st3_curve) curve;
    get_count(meta, "st3.anneal_tokens", 1, std::numeric_limits<uint32_t>::max(), s.anneal_tokens);
    get_count(meta, "st3.anneal_interval", 1, std::numeric_limits<uint32_t>::max(), s.anneal_interval);
    get_number(meta, "st3.anneal_floor", 0, 1, s.anneal_floor);
    if (s.anneal == ST3_CURVE_EXPONENTIAL && s.anneal_floor == 0.0) {
        fail("st3.anneal exponential needs st3.anneal_floor above 0");
    }

    const auto score = meta.find("st3.anneal_score");
    if (score != meta.end()) {
        s.anneal_score = score->second;
    }
    s.anneal_random = s.anneal_score == "random";
    if (!s.anneal_random) {
        s.anneal_terms = parse_score("st3.anneal_score", s.anneal_score);
    }
}

}  // namespace

const char * st3_schedule::curve_name() const { return CURVES[anneal]; }

const char * st3_schedule::rank_name() const { return RANKS[distance]; }

int32_t st3_schedule::last_layer(uint32_t stage) const {
    return stage < cuts.size() ? cuts[stage] : (int32_t) n_layer - 1;
}

uint32_t st3_schedule::least(uint32_t n) const { return std::max(min_keep, round_half_up(n * min_share)); }

uint32_t st3_schedule::target(uint32_t n, uint32_t n0, uint64_t step) const {
    const double x = std::min(1.0, double(step) / anneal_tokens);

    double a = 1.0;
    switch (anneal) {
        case ST3_CURVE_NONE: break;
        case ST3_CURVE_LINEAR: a = 1.0 - (1.0 - anneal_floor) * x; break;
        case ST3_CURVE_COSINE:
            a = anneal_floor + (1.0 - anneal_floor) * 0.5 * (1.0 + std::cos(std::acos(-1.0) * x));
            break;
        case ST3_CURVE_EXPONENTIAL: a = std::pow(anneal_floor, x); break;
    }
    return std::min(n0, std::max(least(n), round_half_up(n0 * a)));
}

double st3_schedule::budget() const { return mean_share(*this, keep); }

uint32_t st3_schedule::stage(int32_t il) const {
    return (uint32_t) (std::lower_bound(cuts.begin(), cuts.end(), il) - cuts.begin());
}

std::vector<uint32_t> st3_schedule::counts(uint32_t n) const {
    std::vector<uint32_t> res = { n };
    for (size_t i = 0; i < cuts.size(); ++i) {
        const uint32_t m = res.back();
        res.push_back(std::min(m, std::max(least(n), round_half_up(m * keep))));
    }
    return res;
}

std::vector<float>
st3_schedule::bias(uint32_t nx, uint32_t ny, uint32_t n_keep, uint32_t i_image, bool by_chance) const {
    std::vector<float> res(size_t(nx) * ny, 0.0f);

    if (by_chance) {
        // a permutation, so that no two tokens tie; Fisher-Yates by hand, as std::shuffle differs between libraries
        std::mt19937          rng(seed + 0x9E3779B9u * (i_image + 1));
        std::vector<uint32_t> order(res.size());
        std::iota(order.begin(), order.end(), 0u);
        for (size_t i = order.size(); i > 1; --i) {
            std::swap(order[i - 1], order[rng() % i]);
        }
        for (size_t i = 0; i < order.size(); ++i) {
            res[order[i]] = float(i) / float(order.size());
        }
    }

    const uint32_t n_even = round_half_up(coverage * n_keep);
    if (n_even > 0) {
        const auto & order = st3_spread_order(nx, ny);
        for (uint32_t i = 0; i < n_even; ++i) {
            res[order[i]] += 1.0f;
        }
    }
    return res;
}

st3_schedule st3_make_schedule(const meta_map & meta, uint32_t n_layer) {
    st3_schedule s;
    s.n_layer = n_layer;

    bool any = false;
    for (const auto & [key, value] : meta) {
        if (key.rfind("st3.", 0) != 0) {
            continue;
        }
        if (std::find(std::begin(KEYS), std::end(KEYS), key) == std::end(KEYS)) {
            fail("unknown metadata key " + key);
        }
        any = true;
    }
    if (!any) {
        return s;
    }

    const auto it = meta.find("st3.preset");
    s.preset      = it == meta.end() ? "st3" : it->second;
    if (s.preset == "off") {
        return s;
    }
    const preset * p =
            std::find_if(std::begin(PRESETS), std::end(PRESETS), [&](const preset & x) { return s.preset == x.name; });
    if (p == std::end(PRESETS)) {
        fail("unknown st3.preset '" + s.preset +
             "' (off, st3, pvtp, paper, fastv, pyramiddrop, vtw, random, downsample)");
    }

    double     budget     = DEFAULT_BUDGET;
    const bool has_budget = get_number(meta, "st3.budget", std::numeric_limits<double>::min(), 1, budget);
    const bool has_keep   = get_number(meta, "st3.keep", 0, 1, s.keep);
    if (has_budget && has_keep) {
        fail("st3.budget and st3.keep exclude each other");
    }
    const bool solved = !has_keep && (has_budget || p->keep < 0);

    const auto layers = [&](double x) { return x <= 1.0 ? std::max(1u, (uint32_t) (x * n_layer)) : (uint32_t) x; };

    s.start    = layers(p->start);
    s.stride   = layers(p->stride);
    s.min_keep = p->min_keep;
    s.score    = p->score;
    s.coverage = p->coverage;
    s.random   = p->random;
    s.merge    = p->merge;
    s.distance = p->distance;

    if (solved) {  // half of a budget at most is spent before the first cut
        s.start = std::min(s.start, layers(budget / 2));
    }
    get_count(meta, "st3.start", 1, n_layer, s.start);
    get_count(meta, "st3.stride", 1, std::numeric_limits<uint32_t>::max(), s.stride);
    get_count(meta, "st3.min_keep", 0, std::numeric_limits<uint32_t>::max(), s.min_keep);
    get_count(meta, "st3.seed", 0, std::numeric_limits<uint32_t>::max(), s.seed);
    get_number(meta, "st3.coverage", 0, 1, s.coverage);
    get_flag(meta, "st3.merge", s.merge);
    size_t rank = s.distance;
    get_name(meta, "st3.rank", RANKS, rank);
    s.distance = rank == 1;

    size_t vision_type = 1;
    get_name(meta, "st3.vision_type", VISION_TYPES, vision_type);
    s.vision_fast = vision_type == 1;

    s.cuts = cut_layers(s.start, s.stride, n_layer);
    if (solved && p->sure && s.cuts.size() > 1) {
        s.min_share = default_min_share(std::max(0.0, budget * n_layer - s.start) / (n_layer - s.start));
    }
    get_number(meta, "st3.min_share", 0, 1, s.min_share);

    const auto score = meta.find("st3.score");
    if (score != meta.end()) {
        s.score = score->second;
    }
    if (!s.random) {
        s.terms = parse_score("st3.score", s.score);
    }
    read_anneal(meta, *p, s);

    if (s.cuts.empty()) {
        if ((has_budget && budget == 1.0) || (has_keep && s.keep == 1.0)) {
            return s;  // nothing is to be dropped in prefill
        }
        fail("no layer follows a cut after layer " + std::to_string(s.start - 1) + " of a model with " +
             std::to_string(n_layer) + " layers (lower st3.start)");
    }
    if (!has_keep) {
        s.keep = solved ? solve_keep(s, budget) : p->keep;
    }
    return s;
}

const std::vector<uint32_t> & st3_spread_order(uint32_t nx, uint32_t ny) {
    static std::mutex                                               mutex;
    static std::map<std::array<uint32_t, 2>, std::vector<uint32_t>> cache;

    const std::lock_guard<std::mutex> lock(mutex);

    auto & order = cache[{ nx, ny }];
    if (!order.empty()) {
        return order;
    }

    const int64_t        n = int64_t(nx) * ny;
    // distance to the nearest chosen patch; before the first, minus the distance to the centre (in half patches)
    std::vector<int64_t> far(n);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t dx = 2 * (i % nx) + 1 - nx;
        const int64_t dy = 2 * (i / nx) + 1 - ny;
        far[i]           = -(dx * dx + dy * dy);
    }
    while ((int64_t) order.size() < n) {
        const int64_t best  = std::max_element(far.begin(), far.end()) - far.begin();
        const bool    first = order.empty();
        order.push_back((uint32_t) best);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t dx = i % nx - best % nx;
            const int64_t dy = i / nx - best / nx;
            const int64_t d  = dx * dx + dy * dy;
            far[i]           = first ? d : std::min(far[i], d);
        }
        far[best] = -1;  // chosen
    }
    return order;
}
