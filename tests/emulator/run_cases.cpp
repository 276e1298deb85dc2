// run_cases.cpp - calls of the op, read from stdin as test_attn_span_kernels.py writes them, and their results.
#include "emulate.h"

#include "attn-span-ref.h"
#include "attn-span.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "lanes.h"

#include <cmath>

template <typename T> static bool read_some(T * data, size_t n) {
    return n == 0 || fread(data, sizeof(T), n, stdin) == n;
}

struct test_case {
    // shape and strides in bytes, as the tensors have them
    int64_t seed, n_sm, k_kind, d, n_q, n_head, n_kv, n_head_kv, n_span, is_max, mask_f16;
    int64_t q_row, q_head, q_first, k_cell, k_head, k_first, mask_row, mask_first;
    int64_t q_size, k_size, mask_size;
    double  scale;

    bool read() { return read_some(&seed, 22) && read_some(&scale, 1); }
};

static ggml_backend_buffer buffer;  // of which only the address is used

// The tensors of a case, each in memory of exactly its size.
struct test_op {
    const emulated_op &   op;
    test_case             c;
    ggml_tensor           q = {}, k = {}, mask = {}, ids = {}, dst = {};
    lanes::fresh<char>    q_data, k_data, mask_data;
    lanes::fresh<int32_t> ids_data;
    lanes::fresh<char>    dst_data;  // with what the backend asks for besides

    test_op(const emulated_op & op, const test_case & c) :
        op(op),
        c(c),
        q_data(c.q_size),
        k_data(c.k_size),
        mask_data(c.mask_size),
        ids_data(c.n_span),
        dst_data(describe()) {
        if (!read_some(q_data.data, c.q_size) || !read_some(k_data.data, c.k_size) ||
            !read_some(mask_data.data, c.mask_size) || !read_some(ids_data.data, c.n_span)) {
            lanes::fail("a case is cut short", 0);
        }
        q.data    = q_data.data + c.q_first;
        k.data    = k_data.data + c.k_first;
        mask.data = mask_data.data + c.mask_first;
        ids.data  = ids_data.data;
        dst.data  = dst_data.data;
    }

    // Writes whether the kernels take the call, what they made of it, and what is right.
    void run() {
        const int64_t       taken = op.supports(&dst);
        std::vector<float>  got(c.n_span);
        std::vector<double> want(c.n_span);

        if (taken) {
            op.compute(&dst, (int) c.n_sm, (unsigned) c.seed);
            memcpy(got.data(), dst_data.data, c.n_span * sizeof(float));
        }

        std::vector<float> dense_q(c.n_head * c.n_q * c.d), dense_k(c.n_head_kv * c.n_kv * c.d),
                dense_mask(c.n_q * c.n_kv);
        if (!read_some(dense_q.data(), dense_q.size()) || !read_some(dense_k.data(), dense_k.size()) ||
            !read_some(dense_mask.data(), dense_mask.size())) {
            lanes::fail("a case is cut short", 0);
        }
        attn_span_ref(
                dense_q.data(), dense_k.data(), dense_mask.data(), ids_data.data, want.data(), c.d, c.n_q, c.n_head,
                c.n_kv, c.n_head_kv, c.n_span, c.scale, c.is_max);

        fwrite(&taken, sizeof(taken), 1, stdout);
        fwrite(got.data(), sizeof(float), got.size(), stdout);
        fwrite(want.data(), sizeof(double), want.size(), stdout);
    }

  private:
    size_t describe() {
        set(q, GGML_TYPE_F32, c.d, c.n_q, c.n_head, 4, c.q_row, c.q_head, c.q_first);
        set(k, (ggml_type) c.k_kind, c.d, c.n_kv, c.n_head_kv, 0, c.k_cell, c.k_head, c.k_first);
        set(mask, c.mask_f16 ? GGML_TYPE_F16 : GGML_TYPE_F32, c.n_kv, c.n_q, 1, c.mask_f16 ? 2 : 4, c.mask_row, 0,
            c.mask_first);
        set(ids, GGML_TYPE_I32, c.n_span, 1, 1, 4, 4 * c.n_span, 4 * c.n_span, 0);
        set(dst, GGML_TYPE_F32, c.n_span, 1, 1, 4, 4 * c.n_span, 4 * c.n_span, 0);
        dst.nb[3] = 4 * c.n_span;

        const float   scale  = (float) c.scale;
        const int32_t reduce = c.is_max ? GGML_ATTN_SPAN_MAX : GGML_ATTN_SPAN_MEAN;
        memcpy(&dst.op_params[0], &scale, sizeof(scale));
        memcpy(&dst.op_params[1], &reduce, sizeof(reduce));
        dst.op     = GGML_OP_ATTN_SPAN;
        dst.src[0] = &q;
        dst.src[1] = &k;
        dst.src[2] = &mask;
        dst.src[3] = &ids;

        return sizeof(float) * c.n_span + (op.supports(&dst) ? op.extra(&dst) : 0);
    }

    static void
    set(ggml_tensor & t, ggml_type type, int64_t n0, int64_t n1, int64_t n2, size_t nb0, size_t nb1, size_t nb2,
        size_t first) {
        t.type      = type;
        t.ne[0]     = n0;
        t.ne[1]     = n1;
        t.ne[2]     = n2;
        t.ne[3]     = 1;
        t.nb[0]     = nb0;
        t.nb[1]     = nb1;
        t.nb[2]     = nb2;
        t.view_offs = first;
        t.buffer    = &buffer;
    }
};

// What the kernels' hosts use of libggml-base.
extern "C" bool ggml_is_quantized(ggml_type type) {
    return type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16;
}

extern "C" size_t ggml_nbytes(const ggml_tensor * t) {
    return t->ne[0] * t->nb[0];  // asked of the result alone
}

extern "C" void ggml_abort(const char * file, int line, const char *, ...) {
    fprintf(stderr, "%s:%d: aborted\n", file, line);
    exit(1);
}

extern "C" const char * ggml_type_name(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return "f32";
        case GGML_TYPE_F16: return "f16";
        case GGML_TYPE_BF16: return "bf16";
        case GGML_TYPE_Q8_0: return "q8_0";
        case GGML_TYPE_Q4_0: return "q4_0";
        case GGML_TYPE_Q4_1: return "q4_1";
        case GGML_TYPE_Q5_0: return "q5_0";
        case GGML_TYPE_Q5_1: return "q5_1";
        default: return "?";
    }
}

int main() {
    for (test_case c; c.read();) {
        test_op(*emulated_attn_span(), c).run();
    }
}
