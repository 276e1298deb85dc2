// Products by ggml's AMX code, compiled into this program as ggml compiles it: mmq.cpp is included as it is. For every
// type and number of rows one line: type, rows, the largest difference from the product in double precision of the same
// weights, by the largest value. Exit code 1 where one is above TOLERANCE. With an argument it uses a tile that was never
// configured instead.

#include "ggml-cpu/amx/mmq.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "ggml-cpu.h"

void ggml_barrier(struct ggml_threadpool *) {}  // one thread

namespace {

constexpr int    K = 512, N = 64;
constexpr double TOLERANCE = 0.02;  // activations have 8 bits

double largest_difference(ggml_type type, int rows, std::mt19937 & random) {
    std::normal_distribution<float> normal;
    std::vector<float>              weights(N * K), activations(rows * K), out(rows * N, NAN), read(N * K);
    for (auto * values : { &weights, &activations }) {
        for (float & value : *values) {
            value = normal(random);
        }
    }
    std::vector<uint8_t> stored(N * ggml_row_size(type, K));
    ggml_quantize_chunk(type, weights.data(), stored.data(), 0, N, K, nullptr);
    ggml_get_type_traits(type)->to_float(stored.data(), read.data(), N * K);

    ggml_context * ctx    = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor *  matrix = ggml_new_tensor_2d(ctx, type, K, N);
    ggml_tensor *  input  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, K, rows);
    ggml_tensor *  output = ggml_mul_mat(ctx, matrix, input);

    std::vector<uint8_t> packed(ggml_backend_amx_get_alloc_size(matrix));
    matrix->data = packed.data();
    ggml_backend_amx_convert_weight(matrix, stored.data(), 0, stored.size());
    input->data  = activations.data();
    output->data = out.data();
    std::vector<uint8_t>      work(ggml_backend_amx_desired_wsize(output));
    const ggml_compute_params params = { 0, 1, work.size(), work.data(), nullptr, false };
    ggml_backend_amx_mul_mat(&params, output);

    double difference = 0, largest = 0;
    for (int m = 0; m < rows; m++) {
        for (int n = 0; n < N; n++) {
            double sum = 0;
            for (int k = 0; k < K; k++) {
                sum += double{ activations[m * K + k] } * double{ read[n * K + k] };
            }
            const double off = std::abs(sum - double{ out[m * N + n] });
            difference       = off <= difference ? difference : off;  // a NaN stays
            largest          = std::max(largest, std::abs(sum));
        }
    }
    ggml_free(ctx);
    return difference / largest;
}

}  // namespace

int main(int argc, char **) {
    syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (argc > 1) {
        _tile_zero(0);
        return 0;
    }
    ggml_cpu_init();
    std::mt19937 random(1);
    bool         right = true;
    for (const auto type : { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
                             GGML_TYPE_Q6_K, GGML_TYPE_IQ4_XS }) {
        for (const int rows : { 1, 2, 16, 17, 32, 33, 58 }) {
            const double off = largest_difference(type, rows, random);
            printf("%s %d %.5f\n", ggml_type_name(type), rows, off);
            right &= off < TOLERANCE;
        }
    }
    return right ? 0 : 1;
}
