// kept-pool.h - the threads of a CPU backend whose user attached no pool. Included by ggml-cpu.cpp (vendor/fixes/0002).
#pragma once

#include "ggml-cpu.h"

#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

// Upstream makes threads for each graph anew and ends them after it. These stay, and sleep between graphs.
class ggml_kept_pool {
  public:
    ggml_kept_pool()                                   = default;
    ggml_kept_pool(const ggml_kept_pool &)             = delete;
    ggml_kept_pool & operator=(const ggml_kept_pool &) = delete;

    ~ggml_kept_pool() { end(); }

    // A pool of at least n_threads, or NULL for the caller's thread alone. With OpenMP always NULL: that keeps threads.
    ggml_threadpool_t of(int n_threads) {
#ifdef GGML_USE_OPENMP
        n_threads = 1;
#endif
        if (n_threads <= 1) {
            return nullptr;
        }
        if (!pool || owner != getpid() || size < n_threads) {
            end();
            ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
            params.poll                   = 0;
            pool                          = ggml_threadpool_new(&params);
            owner                         = getpid();
            size                          = n_threads;
        }
        return pool;
    }

  private:
    void end() {
        if (pool && owner == getpid()) {  // a forked child has none of the threads
            ggml_threadpool_free(pool);
        }
        pool = nullptr;
    }

    ggml_threadpool_t pool  = nullptr;
    int               owner = 0;  // process
    int               size  = 0;
};
