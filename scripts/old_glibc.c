// What GCC's libstdc++ wants of glibc, and an older one has not. Linked statically into each library, hidden (old_glibc.py).
#include <errno.h>
#include <stdint.h>
#include <sys/random.h>
#include <unistd.h>

#define HIDDEN __attribute__((visibility("hidden")))

HIDDEN char __libc_single_threaded = 0; // 2.32; 0: there may be other threads

// 2.36, for std::random_device
HIDDEN uint32_t arc4random(void) {
    uint32_t number;
    while (getrandom(&number, sizeof(number), 0) != (ssize_t) sizeof(number)) {
        if (errno != EINTR) {
            __builtin_trap();
        }
    }

    return number;
}
