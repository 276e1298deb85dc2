// An operator new of at least LARGE bytes that throws when it is told to: for LD_PRELOAD. Smaller ones seldom fail, and where one
// does in the middle of a compute, upstream's tables of cells are left in disorder.

#include <cstdint>
#include <cstdlib>
#include <new>

static constexpr std::size_t LARGE = 512;

static thread_local long left = -1;  // -1: no call fails

// Lets the n-th such call of this thread from now on fail, 0 the next one. Returns how many were left before it; -1: it came.
extern "C" long fail_after(long n) {
    const long res = left;
    left           = n;
    return res;
}

void * operator new(std::size_t size) {
    if (size >= LARGE && left >= 0 && left-- == 0) {
        throw std::bad_alloc();
    }
    if (void * res = std::malloc(size ? size : 1)) {
        return res;
    }
    throw std::bad_alloc();
}

struct batch_t {  // as large as llama_batch
    int32_t n_tokens;
    void *  rest[6];
};

// llama_decode(), which lets through what is thrown before a batch reaches ST3; -2 then.
extern "C" int decode_caught(int (*decode)(void *, batch_t), void * ctx, batch_t batch) {
    try {
        return decode(ctx, batch);
    } catch (const std::bad_alloc &) {
        return -2;
    }
}
