// lanes.h - runs the threads of a GPU's threadgroup as fibers of one CPU thread, so that a kernel's own text can be
// tested where there is no GPU, under ASan and UBSan.
//
// A fiber runs until it meets a barrier, a shuffle or its end. Which warp and which lane goes on next is drawn from a
// seed, so that code that relies on an order fails for some seed. A barrier that a lane of the group misses, and a
// shuffle that a lane of the warp misses or meets elsewhere in the text, end the program. What this cannot show: the
// speed, registers and spills, and memory that becomes visible late.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

namespace lanes {

constexpr int    WARP       = 32;
constexpr size_t STACK_SIZE = 128 * 1024;

enum class state { ready, at_barrier, at_shuffle, done };

struct lane {
    ucontext_t        context;
    std::vector<char> stack = std::vector<char>(STACK_SIZE);
    void *            fake_stack;
    state             at;
    int               site;      // line of the barrier or shuffle
    int               distance;  // of a shuffle
    uint32_t          value;     // given to a shuffle, then got from it
};

inline std::mt19937                            rng;
inline std::vector<lane>                       all;
inline int                                     n_threads;
inline int                                     now;  // the lane that runs
inline ucontext_t                              scheduler;
inline void *                                  scheduler_fake_stack;
inline const void *                            scheduler_stack;
inline size_t                                  scheduler_stack_size;
inline const std::function<void(int thread)> * body;

[[noreturn]] inline void fail(const char * message, int site) {
    fprintf(stderr, "lanes: %s (line %d of the kernel)\n", message, site);
    exit(1);
}

// ASan has to be told of another stack, where it is in the program.
#pragma weak __sanitizer_start_switch_fiber
#pragma weak __sanitizer_finish_switch_fiber

inline void leave_stack(void ** fake, const void * to, size_t size) {
    if (__sanitizer_start_switch_fiber) {
        __sanitizer_start_switch_fiber(fake, to, size);
    }
}

inline void arrive_on_stack(void * fake, const void ** from, size_t * size) {
    if (__sanitizer_finish_switch_fiber) {
        __sanitizer_finish_switch_fiber(fake, from, size);
    }
}

inline void to_scheduler(bool last) {
    lane & self = all[now];

    leave_stack(last ? nullptr : &self.fake_stack, scheduler_stack, scheduler_stack_size);
    swapcontext(&self.context, &scheduler);
    arrive_on_stack(self.fake_stack, &scheduler_stack, &scheduler_stack_size);
}

inline void enter() {
    arrive_on_stack(nullptr, &scheduler_stack, &scheduler_stack_size);
    (*body)(now);
    all[now].at = state::done;
    to_scheduler(true);
}

inline void to_lane(int i) {
    now = i;
    leave_stack(&scheduler_fake_stack, all[i].stack.data(), STACK_SIZE);
    swapcontext(&scheduler, &all[i].context);
    arrive_on_stack(scheduler_fake_stack, nullptr, nullptr);
}

inline void barrier(int site) {
    all[now].at   = state::at_barrier;
    all[now].site = site;
    to_scheduler(false);
}

template <typename T> T shuffle_xor(T x, int distance, int site) {
    static_assert(sizeof(T) == sizeof(uint32_t));

    lane & self   = all[now];
    self.at       = state::at_shuffle;
    self.site     = site;
    self.distance = distance;
    memcpy(&self.value, &x, sizeof(x));
    to_scheduler(false);
    memcpy(&x, &self.value, sizeof(x));
    return x;
}

inline std::vector<int> shuffled(int n) {
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    return order;
}

// Completes the shuffle that a warp's lanes wait at.
inline void exchange(lane * warp) {
    uint32_t values[WARP];
    for (int i = 0; i < WARP; ++i) {
        if (warp[i].at != state::at_shuffle) {
            fail("a lane misses a shuffle", warp[0].site);
        }
        if (warp[i].site != warp[0].site || warp[i].distance != warp[0].distance) {
            fail("lanes of a warp shuffle at different places", warp[i].site);
        }
        values[i] = warp[i].value;
    }
    for (int i = 0; i < WARP; ++i) {
        warp[i].value = values[i ^ warp[i].distance];
        warp[i].at    = state::ready;
    }
}

// Runs f(thread) for every thread of one threadgroup.
inline void run_group(int n, const std::function<void(int thread)> & f) {
    if (n % WARP != 0) {
        fail("a threadgroup is whole warps", 0);
    }
    n_threads = n;
    body      = &f;
    if ((int) all.size() < n) {
        all.resize(n);
    }
    for (int i = 0; i < n; ++i) {
        lane & l = all[i];
        getcontext(&l.context);
        l.context.uc_stack.ss_sp   = l.stack.data();
        l.context.uc_stack.ss_size = STACK_SIZE;
        l.context.uc_link          = nullptr;
        makecontext(&l.context, enter, 0);
        l.fake_stack = nullptr;
        l.at         = state::ready;
    }

    const auto is = [](int i, state s) { return all[i].at == s; };

    while (true) {
        // one warp at a time goes on, to wherever its lanes have to wait for each other
        bool ran = false;
        for (int w : shuffled(n / WARP)) {
            lane * warp = &all[w * WARP];
            if (std::any_of(warp, warp + WARP, [](const lane & l) { return l.at == state::at_shuffle; })) {
                exchange(warp);
            }
            for (int i : shuffled(WARP)) {
                if (warp[i].at == state::ready) {
                    to_lane(w * WARP + i);
                    ran = true;
                }
            }
            if (ran && rng() % 2) {
                break;
            }
        }
        if (ran) {
            continue;
        }

        if (is(0, state::done)) {
            for (int i = 0; i < n; ++i) {
                if (!is(i, state::done)) {
                    fail("a lane waits at a barrier that others never reach", all[i].site);
                }
            }
            return;
        }
        for (int i = 0; i < n; ++i) {
            if (!is(i, state::at_barrier) || all[i].site != all[0].site) {
                fail("a lane misses a barrier", all[0].site);
            }
        }
        for (int i = 0; i < n; ++i) {
            all[i].at = state::ready;
        }
    }
}

// Memory of exactly that many bytes, of which nothing has been written yet: every float in it is no number.
template <typename T> struct fresh {
    T * data;

    explicit fresh(size_t n) : data((T *) malloc(std::max<size_t>(n * sizeof(T), 1))) {
        memset((void *) data, 0xff, n * sizeof(T));
    }
    fresh(const fresh &) = delete;
    ~fresh() { free(data); }
};

// Runs the groups of a launch one by one, in any order. f(x, y, z, thread)
template <typename F> void run_grid(int gx, int gy, int gz, int n, const F & f) {
    for (int g : shuffled(gx * gy * gz)) {
        run_group(n, [&](int thread) { f(g % gx, g / gx % gy, g / gx / gy, thread); });
    }
}

}  // namespace lanes
