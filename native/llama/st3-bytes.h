// st3-bytes.h - bytes of a saved state: written one after the other, read within bounds, summed up.
#pragma once

#include "ggml-backend.h"
#include "llama-io.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

[[noreturn]] inline void st3_fail(const std::string & what) { throw std::runtime_error("st3: " + what); }

// FNV-1a over 64-bit words, the last one padded with zeros: each step is a bijection, so no change of one word is missed.
class st3_checksum {
  public:
    void add(const void * data, size_t size) {
        const auto * p = (const uint8_t *) data;
        for (; size > 0 && n % sizeof(word) != 0; --size) {
            add_byte(*p++);
        }
        for (; size >= sizeof(word); p += sizeof(word), size -= sizeof(word), n += sizeof(word)) {
            memcpy(&word, p, sizeof(word));
            sum  = step(word);
            word = 0;
        }
        for (; size > 0; --size) {
            add_byte(*p++);
        }
    }

    uint64_t value() const { return (n % sizeof(word) == 0 ? sum : step(word)) ^ n; }

  private:
    uint64_t step(uint64_t x) const { return (sum ^ x) * 0x100000001b3ull; }

    void add_byte(uint8_t x) {
        memcpy((char *) &word + n % sizeof(word), &x, 1);
        if (++n % sizeof(word) == 0) {
            sum  = step(word);
            word = 0;
        }
    }

    uint64_t sum  = 0xcbf29ce484222325ull;
    uint64_t word = 0;  // that is not full yet
    uint64_t n    = 0;  // bytes so far
};

// A writer that counts.
class st3_io_count : public llama_io_write_i {
  public:
    void   write(const void *, size_t size) override { n += size; }
    void   write_tensor(ggml_tensor *, size_t, size_t size) override { n += size; }
    size_t n_bytes() override { return n; }
    bool   only_counts() const override { return true; }

  private:
    size_t n = 0;
};

// A writer into memory.
class st3_io_bytes : public llama_io_write_i {
  public:
    std::vector<uint8_t> data;

    void write(const void * src, size_t size) override {
        data.insert(data.end(), (const uint8_t *) src, (const uint8_t *) src + size);
    }
    void   write_tensor(ggml_tensor *, size_t, size_t) override { GGML_ABORT("st3_writer reads tensors itself"); }
    size_t n_bytes() override { return data.size(); }
};

// Writes to llama.cpp's writer, and sums up what it wrote unless that only counts.
class st3_writer {
  public:
    explicit st3_writer(llama_io_write_i & io) : io(io), counts(io.only_counts()) {}

    template <typename T> void put(const T & x) { append(&x, sizeof(x)); }

    template <typename T> void put(const std::vector<T> & v) { append(v.data(), v.size() * sizeof(T)); }

    // Bytes [offset, offset + size) of a tensor, through a buffer that does not grow with them.
    void put(const ggml_tensor * t, size_t offset, size_t size) {
        if (counts) {
            io.write_tensor(const_cast<ggml_tensor *>(t), offset, size);
            return;
        }
        buffer.resize(std::min<size_t>(std::max(buffer.size(), size), 1u << 20));
        while (size > 0) {
            const size_t n = std::min(size, buffer.size());
            ggml_backend_tensor_get(t, buffer.data(), offset, n);
            append(buffer.data(), n);
            offset += n;
            size -= n;
        }
    }

    uint64_t checksum() const { return sum.value(); }

  private:
    void append(const void * p, size_t n) {
        if (n == 0) {
            return;  // an empty vector's data() may be null, which memcpy must not be handed
        }
        io.write(p, n);
        if (!counts) {
            sum.add(p, n);
        }
    }

    llama_io_write_i &   io;
    const bool           counts;
    st3_checksum         sum;
    std::vector<uint8_t> buffer;
};

class st3_reader {
  public:
    explicit st3_reader(const std::vector<uint8_t> & data) : data(data) {}

    const uint8_t * take(size_t n) {
        if (n > data.size() - at) {
            st3_fail("the saved state ends too early");
        }
        at += n;
        return data.data() + at - n;
    }

    template <typename T> T get() {
        T res;
        memcpy(&res, take(sizeof(T)), sizeof(T));
        return res;
    }

    template <typename T> std::vector<T> get(size_t n) {
        if (n > data.size() / sizeof(T)) {
            st3_fail("the saved state ends too early");
        }
        std::vector<T> res(n);
        if (n > 0) {
            memcpy(res.data(), take(n * sizeof(T)), n * sizeof(T));
        }
        return res;
    }

    bool done() const { return at == data.size(); }

  private:
    const std::vector<uint8_t> & data;
    size_t                       at = 0;
};
