// barrier-wait.h - how a thread of ggml's own pool waits for the others: it spins while that pays, else it sleeps.
//
// Upstream spins without end. Where other programs want the CPUs, the thread that is waited for may have none, and the
// one that waits keeps it from getting one. A thread that sleeps asks Linux (from 6.12 on) for short slices of a CPU from
// then on: the same share of it in all, but sooner when it wakes. Included by ggml-cpu.c behind struct ggml_threadpool
// (vendor/fixes/0002).
#pragma once

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Microseconds: threads that all have a CPU come within them; one that has lost its CPU comes back after milliseconds.
#define GGML_BARRIER_SPIN 100

// How many waits in a row sleep at once, at most, after spinning was in vain again and again.
#define GGML_BARRIER_REST 1023

// Upstream's atomics of MSVC know fetch_add alone, and older ones of it no _Thread_local in C.
#if defined(_MSC_VER) && !defined(__clang__)
#define GGML_BARRIER_THREAD_LOCAL __declspec(thread)
#else
#define GGML_BARRIER_THREAD_LOCAL _Thread_local
#endif

static bool ggml_barrier_passed(struct ggml_threadpool * tp, int n_passed) {
    return atomic_load_explicit(&tp->n_barrier_passed, memory_order_seq_cst) != n_passed;
}

// Nanoseconds of a short slice: the least that Linux takes.
#define GGML_BARRIER_SLICE 100000

#if defined(__linux__) && defined(SYS_sched_getattr)
// struct sched_attr of sched_setattr(2), version 0, which glibc declares from 2.41 on.
struct ggml_sched_attr {
    uint32_t size, policy;
    uint64_t flags;
    int32_t  nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

static void ggml_barrier_short_slices(void) {
    static GGML_BARRIER_THREAD_LOCAL bool asked = false;
    if (asked) {
        return;
    }
    asked = true;

    struct ggml_sched_attr attr = { .size = sizeof(attr) };
    if (syscall(SYS_sched_getattr, 0, &attr, sizeof(attr), 0) == 0 &&
        (attr.policy == SCHED_OTHER || attr.policy == SCHED_BATCH)) {
        attr.size    = sizeof(attr);
        attr.runtime = GGML_BARRIER_SLICE;
        syscall(SYS_sched_setattr, 0, &attr, 0);  // where it may not, all is as before
    }
}
#else
static void ggml_barrier_short_slices(void) {}
#endif

static void ggml_barrier_sleep(struct ggml_threadpool * tp, int n_passed) {
    ggml_barrier_short_slices();
    atomic_fetch_add_explicit(&tp->n_barrier_asleep, 1, memory_order_seq_cst);
#if defined(__linux__)
    while (!ggml_barrier_passed(tp, n_passed)) {
        syscall(SYS_futex, &tp->n_barrier_passed, FUTEX_WAIT_PRIVATE, n_passed, NULL, NULL, 0);
    }
#else
    ggml_mutex_lock_shared(&tp->mutex);
    while (!ggml_barrier_passed(tp, n_passed)) {
        ggml_cond_wait(&tp->cond, &tp->mutex);
    }
    ggml_mutex_unlock_shared(&tp->mutex);
#endif
    atomic_fetch_add_explicit(&tp->n_barrier_asleep, -1, memory_order_relaxed);
}

// Returns once n_barrier_passed differs from n_passed, its value when the caller came to the barrier.
static void ggml_barrier_wait(struct ggml_threadpool * tp, int n_passed) {
    static GGML_BARRIER_THREAD_LOCAL int rests = 0;  // after the next spin in vain
    static GGML_BARRIER_THREAD_LOCAL int left  = 0;  // of them now

    if (left > 0) {
        left--;
        ggml_barrier_sleep(tp, n_passed);
        return;
    }
    int64_t end = 0;
    for (int i = 1; !ggml_barrier_passed(tp, n_passed); i++) {
        ggml_thread_cpu_relax();
        if (i % 32 != 0) {
            continue;
        }
        const int64_t now = ggml_time_us();
        if (end == 0) {
            end = now + GGML_BARRIER_SPIN;
        } else if (now > end) {
            left = rests = MIN(2 * rests + 1, GGML_BARRIER_REST);
            ggml_barrier_sleep(tp, n_passed);
            return;
        }
    }
    rests /= 2;
}

// By the last thread, once it has changed n_barrier_passed.
static void ggml_barrier_wake(struct ggml_threadpool * tp) {
    if (atomic_load_explicit(&tp->n_barrier_asleep, memory_order_seq_cst) == 0) {
        return;
    }
#if defined(__linux__)
    syscall(SYS_futex, &tp->n_barrier_passed, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
    ggml_mutex_lock(&tp->mutex);
    ggml_cond_broadcast(&tp->cond);
    ggml_mutex_unlock(&tp->mutex);
#endif
}
