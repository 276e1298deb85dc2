// Multiplies two AMX tiles the way ggml's AMX backend sets them up. Exits 0 only if the CPU, the kernel and the
// hypervisor all let it, and the product is right.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA  18

struct tile_config {
    uint8_t  palette_id;
    uint8_t  start_row;
    uint8_t  reserved[14];
    uint16_t colsb[16];
    uint8_t  rows[16];
};

int main(void) {
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) {
        return 1;
    }

    _Alignas(64) struct tile_config config = { .palette_id = 1 };
    for (int i = 0; i < 8; i++) {
        config.rows[i]  = 16;
        config.colsb[i] = 64;
    }
    _tile_loadconfig(&config);

    _Alignas(64) int8_t  a[16][64], b[16][64];
    _Alignas(64) int32_t c[16][16];
    memset(a, 2, sizeof a);
    memset(b, 3, sizeof b);
    memset(c, 0, sizeof c);
    _tile_loadd(0, a, 64);
    _tile_loadd(1, b, 64);
    _tile_loadd(2, c, 64);
    _tile_dpbssd(2, 0, 1);
    _tile_stored(2, c, 64);
    _tile_release();

    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) {
            if (c[i][j] != 64 * 2 * 3) {
                return 2;
            }
        }
    }
    return 0;
}
