// Memory that ggml allocates is NaN until something is written to it: for LD_PRELOAD.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

int posix_memalign(void ** out, size_t alignment, size_t size) {
    static int (*next)(void **, size_t, size_t);
    if (!next) {
        *(void **) &next = dlsym(RTLD_NEXT, "posix_memalign");
    }
    const int error = next(out, alignment, size);
    if (!error) {
        memset(*out, 0xff, size);
    }
    return error;
}
