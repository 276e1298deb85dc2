// st3-vision.cpp - the vision encoder's graph with products and attention by kernels of ours.

#include "st3-vision.h"

#ifdef __GNUC__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"  // upstream's header defines some
#endif
#include "clip-graph.h"
#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
#include "st3-kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <vector>

namespace {

constexpr int64_t MIN_ROWS = 32;    // fewer are left to stock's ops
constexpr int64_t MAX_ROWS = 1024;  // of one piece of work: their sums stay in L2

// What an op of ours keeps in its op_params, behind ggml_custom_op_params.
struct op_state {
    std::atomic<int32_t> next;  // piece of work
    std::atomic<int32_t> done;  // threads
    int32_t              activation;
    float                scale;
};

constexpr size_t OP_STATE_AT = 24;  // sizeof(ggml_custom_op_params)
static_assert(OP_STATE_AT + sizeof(op_state) <= GGML_MAX_OP_PARAMS, "no room in op_params");

op_state & state_of(ggml_tensor * t) { return *(op_state *) ((char *) t->op_params + OP_STATE_AT); }

// Gives the n pieces of an op's work to threads as they come; the last one makes it ready for another compute.
template <typename F> void share(ggml_tensor * dst, int nth, int64_t n, F work) {
    op_state & state = state_of(dst);
    for (int64_t i; (i = state.next++) < n;) {
        work(i);
    }
    if (++state.done == nth) {
        state.next = 0;
        state.done = 0;
    }
}

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Into how many pieces n rows go, so that all pieces are several a thread.
int64_t row_pieces(int64_t n, int64_t others, int nth) {
    const int64_t wanted = pieces(4 * nth, others);
    return std::max(pieces(n, MAX_ROWS), std::min(wanted, pieces(n, 2 * MIN_ROWS)));
}

void multiply(ggml_tensor * dst, int, int nth, void * kernels) {
    const ggml_tensor * x = dst->src[0];
    const ggml_tensor * w = dst->src[1];

    st3_product p;
    p.x          = x->data;
    p.w          = w->data;
    p.w_row      = w->nb[1];
    p.w_type     = w->type;
    p.bias       = dst->src[2] ? (const float *) dst->src[2]->data : nullptr;
    p.activation = (st3_activation) state_of(dst).activation;
    p.y          = dst->data;
    p.y_type     = dst->type;
    p.k          = w->ne[0];
    p.n          = w->ne[1];

    const int64_t m       = ggml_nrows(x);
    const int64_t columns = pieces(p.n, ST3_COLUMNS);
    const int64_t rows    = row_pieces(m, columns, nth);
    share(dst, nth, rows * columns, [&](int64_t i) {
        const int64_t n0 = i % columns * ST3_COLUMNS;
        const int64_t j  = i / columns;
        ((const st3_kernels *) kernels)
                ->multiply(p, m * j / rows, m * (j + 1) / rows, n0, std::min(n0 + ST3_COLUMNS, p.n));
    });
}

void attend(ggml_tensor * dst, int, int nth, void * kernels) {
    const ggml_tensor * q = dst->src[0];  // [d, n, n_head, n_picture]
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    const auto head_of = [](const ggml_tensor * t, int64_t head, int64_t picture) {
        return (const float *) ((const char *) t->data + head * t->nb[2] + picture * t->nb[3]);
    };
    const int64_t n     = q->ne[1];
    const int64_t heads = q->ne[2] * q->ne[3];
    const int64_t rows  = row_pieces(n, heads, nth);
    const int64_t group = q->ne[2] / k->ne[2];
    share(dst, nth, rows * heads, [&](int64_t i) {
        const int64_t j       = i / heads;
        const int64_t head    = i % heads % q->ne[2];
        const int64_t picture = i % heads / q->ne[2];

        st3_attention a;
        a.q      = head_of(q, head, picture);
        a.k      = head_of(k, head / group, picture);
        a.v      = head_of(v, head / group, picture);
        a.q_row  = q->nb[1] / sizeof(float);
        a.k_row  = k->nb[1] / sizeof(float);
        a.v_row  = v->nb[1] / sizeof(float);
        a.y      = (char *) dst->data + head * dst->nb[1] + picture * dst->nb[3];
        a.y_row  = dst->nb[2] / ggml_type_size(dst->type);
        a.y_type = dst->type;
        a.d      = q->ne[0];
        a.n_kv   = k->ne[1];
        a.scale  = state_of(dst).scale;
        ((const st3_kernels *) kernels)->attend(a, n * j / rows, n * (j + 1) / rows);
    });
}

class rewriter {
  public:
    rewriter(ggml_context * ctx, ggml_cgraph * gf, const st3_kernels & kernels) : ctx(ctx), gf(gf), kernels(kernels) {
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            ggml_tensor * node = ggml_graph_node(gf, i);
            nodes.push_back(node);
            for (ggml_tensor * src : node->src) {
                if (src) {
                    users[src].push_back(node);
                }
            }
        }
    }

    void run() {
        std::vector<ggml_tensor *> ends;  // what nobody in the graph reads
        for (ggml_tensor * node : nodes) {
            if (!(node->flags & GGML_TENSOR_FLAG_COMPUTE)) {
                return;  // a graph of several branches, of which some are not computed
            }
            if (users.count(node) == 0) {
                ends.push_back(node);
            }
        }
        for (ggml_tensor * node : nodes) {
            if (is_product(node)) {
                products.push_back(node);
            }
        }
        for (ggml_tensor * node : nodes) {
            if (is_attention(node)) {
                rewrite_attention(node);
            }
        }
        for (ggml_tensor * node : products) {
            rewrite_product(node);
        }
        if (made.empty()) {
            return;
        }
        ggml_graph_clear(gf);
        for (ggml_tensor * end : ends) {
            ggml_build_forward_expand(gf, end);
        }
    }

  private:
    static bool is_weight(const ggml_tensor * t) {
        return t && t->op == GGML_OP_NONE && !(t->flags & GGML_TENSOR_FLAG_INPUT) && ggml_is_contiguous(t);
    }

    static bool is_product(const ggml_tensor * t) {
        const ggml_tensor * w = t->src[0];
        const ggml_tensor * x = t->src[1];
        if (t->op != GGML_OP_MUL_MAT || !is_weight(w) || ggml_nrows(w) != w->ne[1] || w->ne[0] % 2 != 0) {
            return false;
        }
        if (w->type != GGML_TYPE_F32 && w->type != GGML_TYPE_F16 && w->type != GGML_TYPE_BF16 &&
            !(ggml_is_quantized(w->type) && ggml_get_type_traits(w->type)->to_float)) {
            return false;
        }
        if (std::strstr(w->name, "gate_inp")) {
            return false;  // which experts are chosen is decided in F32
        }
        return x->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && ggml_nrows(x) >= MIN_ROWS;
    }

    // The F32 tensor that was cast to the type that the flash kernel takes.
    static ggml_tensor * before_cast(ggml_tensor * t) {
        return t->op == GGML_OP_CPY && t->type == GGML_TYPE_F16 ? t->src[0] : t;
    }

    static bool is_attention(const ggml_tensor * t) {
        if (t->op != GGML_OP_FLASH_ATTN_EXT || t->src[3] || t->src[4]) {
            return false;
        }
        float params[3];  // scale, max_bias, softcap
        std::memcpy(params, t->op_params, sizeof(params));
        const ggml_tensor * q = t->src[0];
        const ggml_tensor * k = before_cast(t->src[1]);
        const ggml_tensor * v = before_cast(t->src[2]);
        for (const ggml_tensor * x : { q, k, v }) {
            if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || x->ne[3] != q->ne[3]) {
                return false;
            }
        }
        return params[1] == 0.0f && params[2] == 0.0f && q->ne[0] % 2 == 0 && q->ne[0] == v->ne[0] &&
               q->ne[2] % k->ne[2] == 0 && k->ne[2] == v->ne[2] && q->ne[1] >= MIN_ROWS;
    }

    bool is_output(const ggml_tensor * t) const { return (t->flags & GGML_TENSOR_FLAG_OUTPUT) || users.count(t) == 0; }

    // The only user of t, if it has just one and is read by nobody outside; else null.
    ggml_tensor * user_of(const ggml_tensor * t) const {
        return is_output(t) || users.at(t).size() != 1 ? nullptr : users.at(t)[0];
    }

    // Whether nothing but products of ours read t.
    bool is_for_products(const ggml_tensor * t) const {
        return !is_output(t) && std::all_of(users.at(t).begin(), users.at(t).end(), [&](const ggml_tensor * user) {
            return user->src[1] == t && std::find(products.begin(), products.end(), user) != products.end();
        });
    }

    void make_narrow(ggml_tensor * t) const {
        t->type = kernels.type;
        for (int i = 0; i < GGML_MAX_DIMS; ++i) {
            t->nb[i] = i == 0 ? ggml_type_size(t->type) : t->nb[i - 1] * t->ne[i - 1];
        }
    }

    ggml_tensor * narrow(ggml_tensor * x) {
        if (x->type == kernels.type) {
            return x;
        }
        ggml_tensor *& cast = casts[x];
        if (!cast) {
            cast = ggml_cast(ctx, x, kernels.type);
        }
        return cast;
    }

    // Turns a node into an op of ours, in its place.
    void make(ggml_tensor * node, ggml_custom_op_t fun, std::initializer_list<ggml_tensor *> args) {
        std::vector<ggml_tensor *> list(args);
        const ggml_tensor *        op = ggml_custom_4d(
                       ctx, GGML_TYPE_F32, 1, 1, 1, 1, list.data(), list.size(), fun, GGML_N_TASKS_MAX, (void *) &kernels);
        node->op = op->op;
        std::memcpy(node->op_params, op->op_params, sizeof(op->op_params));
        std::memcpy(node->src, op->src, sizeof(op->src));
        new (&state_of(node)) op_state{};
        made.push_back(node);
    }

    void rewrite_attention(ggml_tensor * node) {
        float scale;
        std::memcpy(&scale, node->op_params, sizeof(scale));
        make(node, attend, { node->src[0], before_cast(node->src[1]), before_cast(node->src[2]) });
        state_of(node).scale = scale;
        ggml_set_name(node, ST3_VISION_ATTENTION);

        ggml_tensor * view = user_of(node);
        if (view && view->op == GGML_OP_RESHAPE && is_for_products(view)) {
            make_narrow(node);
            make_narrow(view);
        }
    }

    void rewrite_product(ggml_tensor * node) {
        ggml_tensor * w    = node->src[0];
        ggml_tensor * x    = narrow(node->src[1]);
        ggml_tensor * bias = nullptr;

        ggml_tensor * next = user_of(node);
        if (next && next->op == GGML_OP_ADD && next->src[0] == node && is_weight(next->src[1]) &&
            next->src[1]->type == GGML_TYPE_F32 && ggml_nelements(next->src[1]) == w->ne[1]) {
            bias = next->src[1];
            node = next;
            next = user_of(node);
        }
        st3_activation activation = ST3_ACTIVATION_NONE;
        if (next && next->op == GGML_OP_UNARY && next->view_src == nullptr) {
            switch (ggml_get_unary_op(next)) {
                case GGML_UNARY_OP_GELU: activation = ST3_ACTIVATION_GELU; break;
                case GGML_UNARY_OP_GELU_QUICK: activation = ST3_ACTIVATION_GELU_QUICK; break;
                default: break;
            }
            node = activation == ST3_ACTIVATION_NONE ? node : next;
        }
        make(node, multiply, { x, w, bias });
        state_of(node).activation = activation;
        if (is_for_products(node)) {
            make_narrow(node);
        }
    }

    ggml_context *      ctx;
    ggml_cgraph *       gf;
    const st3_kernels & kernels;

    std::vector<ggml_tensor *>                                nodes;
    std::vector<ggml_tensor *>                                products;  // as they were in the graph
    std::vector<ggml_tensor *>                                made;
    std::map<const ggml_tensor *, std::vector<ggml_tensor *>> users;
    std::map<const ggml_tensor *, ggml_tensor *>              casts;
};

// The fastest that this CPU has; null: none. $ST3_VISION_KERNELS, for tests, names others.
const st3_kernels * choose_kernels() {
    const char * wanted = std::getenv("ST3_VISION_KERNELS");
    const auto   is     = [&](const char * name) { return !wanted || std::strcmp(wanted, name) == 0; };

    const st3_kernels * found = is("avx512-bf16") ? st3_kernels_avx512_bf16() : nullptr;
    if (!found && is("avx512")) {
        found = st3_kernels_avx512();
    }
    return !found && is("avx2") ? st3_kernels_avx2() : found;
}

}  // namespace

ggml_cgraph * st3_vision_build(clip_graph & builder, bool fast) {
    ggml_cgraph *       gf      = builder.build();
    const st3_kernels * kernels = fast && builder.model.modality == CLIP_MODALITY_VISION ? choose_kernels() : nullptr;
    if (kernels) {
        rewriter(builder.ctx0, gf, *kernels).run();
    }
    return gf;
}
