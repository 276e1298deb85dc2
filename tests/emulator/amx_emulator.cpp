// AMX for CPUs without it: a library that carries out tile instructions when they raise SIGILL. Preload it, or link it.
// Linux on x86-64. It is strict where hardware is: a tile that the configuration does not describe, or whose shape does
// not fit the others, ends the process with a line and exit code 86.
//
//     LD_PRELOAD=amx_emulator.so program     with libraries that were compiled for AMX

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <csignal>

namespace {

constexpr long ARCH_REQ_XCOMP_PERM = 0x1023;
constexpr int  FAILED              = 86;

struct config {
    uint8_t  palette_id, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t  rows[16];
};

struct tiles {
    config  cfg;
    uint8_t data[8][16][64];
};

thread_local tiles state;

[[noreturn]] void fail(const char * format, ...) {
    va_list args;
    va_start(args, format);
    fputs("AMX emulator: ", stderr);
    vfprintf(stderr, format, args);
    fputs("\n", stderr);
    _exit(FAILED);
}

// An instruction of the groups 49, 4B, 5C and 5E of the VEX map 0F38.
struct instruction {
    uint8_t op, prefix, mod, reg, rm, vvvv;  // prefix: 0 none, 1 66, 2 F3, 3 F2
    int64_t base, stride;                    // of the operand in memory
    int     length;
};

int64_t reg(const ucontext_t * uc, int number) {
    static const int order[] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };
    return uc->uc_mcontext.gregs[order[number]];
}

bool decode(const ucontext_t * uc, instruction & in) {
    const auto * code = reinterpret_cast<const uint8_t *>(uc->uc_mcontext.gregs[REG_RIP]);
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) {  // 3-byte VEX, 0F38, W0, 128 bits
        return false;
    }
    const int  x = (code[1] & 0x40) ? 0 : 8, b = (code[1] & 0x20) ? 0 : 8;
    const auto modrm = code[4];
    in.op            = code[3];
    in.prefix        = code[2] & 3;
    in.vvvv          = (~code[2] >> 3) & 15;
    in.mod           = modrm >> 6;
    in.reg           = (modrm >> 3) & 7;
    in.rm            = modrm & 7;
    in.base = in.stride = 0;
    in.length           = 5;
    if (in.op != 0x49 && in.op != 0x4B && in.op != 0x5E) {
        return false;
    }
    if (in.mod == 3) {
        return true;
    }
    int  base  = in.rm + b;
    bool plain = false;  // no base register
    if (in.rm == 4) {
        const uint8_t sib   = code[in.length++];
        const int     index = ((sib >> 3) & 7) + x;
        base                = (sib & 7) + b;
        plain               = (sib & 7) == 5 && in.mod == 0;
        in.stride           = index == 4 ? 0 : reg(uc, index) * (int64_t{ 1 } << (sib >> 6));
    }
    int32_t    offset = 0;
    const bool here   = in.rm == 5 && in.mod == 0;  // relative to the next instruction
    if (in.mod == 1) {
        offset = static_cast<int8_t>(code[in.length]);
        in.length += 1;
    } else if (in.mod == 2 || plain || here) {
        memcpy(&offset, code + in.length, 4);
        in.length += 4;
    }
    in.base = offset;
    if (here) {
        in.base += reinterpret_cast<int64_t>(code) + in.length;
    } else if (!plain) {
        in.base += reg(uc, base);
    }
    return true;
}

void load_config(const void * from) {
    state = {};
    memcpy(&state.cfg, from, sizeof(config));
    if (state.cfg.palette_id != 1 || state.cfg.start_row != 0) {
        fail("palette %d, start row %d", state.cfg.palette_id, state.cfg.start_row);
    }
    for (int i = 0; i < 16; i++) {
        const int rows = state.cfg.rows[i], colsb = state.cfg.colsb[i];
        if (rows > (i < 8 ? 16 : 0) || colsb > (i < 8 ? 64 : 0) || (rows == 0) != (colsb == 0)) {
            fail("tile %d cannot have %d rows of %d bytes", i, rows, colsb);
        }
    }
}

void check(int tile) {
    if (tile > 7 || state.cfg.rows[tile] == 0) {
        fail("tile %d is not configured", tile);
    }
}

template <typename A, typename B> void multiply(int dst, int left, int right) {
    const config & c = state.cfg;
    for (const int tile : { dst, left, right }) {
        check(tile);
    }
    const int groups = c.colsb[left] / 4;
    if (c.rows[dst] != c.rows[left] || c.colsb[dst] != c.colsb[right] || c.rows[right] != groups) {
        fail("shapes of tiles %d, %d and %d do not fit", dst, left, right);
    }
    const auto * a   = reinterpret_cast<const A(*)[64]>(state.data[left]);
    const auto * b   = reinterpret_cast<const B(*)[64]>(state.data[right]);
    auto *       sum = reinterpret_cast<uint32_t(*)[16]>(state.data[dst]);
    for (int m = 0; m < c.rows[dst]; m++) {
        for (int k = 0; k < groups; k++) {
            for (int n = 0; n < c.colsb[dst] / 4; n++) {
                for (int i = 0; i < 4; i++) {
                    sum[m][n] += static_cast<uint32_t>(int{ a[m][4 * k + i] } * int{ b[k][4 * n + i] });
                }
            }
        }
    }
}

void move(const instruction & in, bool store) {
    check(in.reg);
    auto & tile = state.data[in.reg];
    if (!store) {
        memset(tile, 0, sizeof tile);
    }
    for (int row = 0; row < state.cfg.rows[in.reg]; row++) {
        auto * memory = reinterpret_cast<uint8_t *>(in.base + row * in.stride);
        store ? memcpy(memory, tile[row], state.cfg.colsb[in.reg]) : memcpy(tile[row], memory, state.cfg.colsb[in.reg]);
    }
}

void carry_out(const instruction & in) {
    enum { NONE, P66, PF3, PF2 };

    if (in.op == 0x49 && in.mod != 3) {
        in.prefix == NONE ? load_config(reinterpret_cast<void *>(in.base)) :
                            void(memcpy(reinterpret_cast<void *>(in.base), &state.cfg, sizeof(config)));
    } else if (in.op == 0x49 && in.prefix == NONE) {
        state = {};
    } else if (in.op == 0x49) {
        check(in.reg);
        memset(state.data[in.reg], 0, sizeof state.data[in.reg]);
    } else if (in.op == 0x4B) {
        move(in, in.prefix == PF3);
    } else {
        const auto of = in.prefix == NONE ? multiply<uint8_t, uint8_t> :
                        in.prefix == P66  ? multiply<uint8_t, int8_t> :
                        in.prefix == PF3  ? multiply<int8_t, uint8_t> :
                                            multiply<int8_t, int8_t>;
        of(in.reg, in.rm, in.vvvv);
    }
}

void on_sigill(int, siginfo_t *, void * context) {
    auto *      uc = static_cast<ucontext_t *>(context);
    instruction in{};
    if (!decode(uc, in)) {
        fail("an illegal instruction that is not AMX's");
    }
    carry_out(in);
    uc->uc_mcontext.gregs[REG_RIP] += in.length;
}

__attribute__((constructor)) void install() {
    struct sigaction action = {};
    action.sa_sigaction     = on_sigill;
    action.sa_flags         = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// ggml asks the kernel for leave to use tiles.
extern "C" long syscall(long number, ...) noexcept {
    va_list args;
    va_start(args, number);
    long a[6];
    for (long & value : a) {
        value = va_arg(args, long);
    }
    va_end(args);
    if (number == SYS_arch_prctl && a[0] == ARCH_REQ_XCOMP_PERM) {
        return 0;
    }
    register long r10 __asm__("r10") = a[3];
    register long r8 __asm__("r8")   = a[4];
    register long r9 __asm__("r9")   = a[5];
    long          result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    if (result < 0 && result > -4096) {
        errno = static_cast<int>(-result);
        return -1;
    }
    return result;
}
