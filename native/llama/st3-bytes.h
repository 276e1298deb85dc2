// st3-bytes.h - bytes of a saved state: written, read within bounds, summed up.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

[[noreturn]] inline void st3_fail(const std::string & what) { throw std::runtime_error("st3: " + what); }

// FNV-1a over 64-bit words, the last one padded with zeros: each step is a bijection, so no change of one word is missed.
inline uint64_t st3_checksum(const std::vector<uint8_t> & data) {
    uint64_t res = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < data.size(); i += sizeof(uint64_t)) {
        uint64_t word = 0;
        memcpy(&word, data.data() + i, std::min(sizeof(word), data.size() - i));
        res = (res ^ word) * 0x100000001b3ull;
    }
    return res ^ data.size();
}

class st3_writer {
  public:
    std::vector<uint8_t> data;

    template <typename T> void put(const T & x) { append(&x, sizeof(x)); }

    template <typename T> void put(const std::vector<T> & v) { append(v.data(), v.size() * sizeof(T)); }

    // room for n bytes, which the caller fills
    uint8_t * make(size_t n) {
        data.resize(data.size() + n);
        return data.data() + data.size() - n;
    }

  private:
    void append(const void * p, size_t n) {
        if (n > 0) {
            memcpy(make(n), p, n);
        }
    }
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
