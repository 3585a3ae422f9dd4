// What a fuzzer's input stands for: parameters first, then the bytes that are decoded. replay.py reads it alike.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "buffer.hpp"

namespace fuzz {

using Bytes = std::vector<std::uint8_t>;  // of exactly its size: a byte further is not ours

inline Bytes bytes_of(checkpoint::Output &out) { return Bytes(out.data(), out.data() + out.size()); }

inline void require(bool condition, const char *otherwise) {
    if (condition) return;
    std::fprintf(stderr, "%s\n", otherwise);
    std::abort();
}

// More than two of the blocks in which values are decoded.
constexpr std::size_t kMostValues = 4400;

class Input {
  public:
    Input(const std::uint8_t *data, std::size_t size) : data_(data), size_(size) {}

    // Little-endian; zeros where the input has ended.
    template <typename Word>
    Word take() {
        Word word = 0;
        const std::size_t bytes = std::min(sizeof word, size_);
        if (bytes > 0) std::memcpy(&word, data_, bytes);
        skip(bytes);
        return word;
    }

    std::size_t take_count() { return take<std::uint16_t>() % kMostValues; }

    // `count` words, which repeat the next `period` of the input.
    template <typename Word>
    std::vector<Word> take_repeated(std::size_t period, std::size_t count) {
        std::vector<Word> few, all(count);
        for (std::size_t i = 0; i < period; ++i) few.push_back(take<Word>());
        for (std::size_t i = 0; i < count; ++i) all[i] = few[i % period];
        return all;
    }

    Bytes rest() const { return Bytes(data_, data_ + size_); }

  private:
    void skip(std::size_t bytes) {
        data_ += bytes;
        size_ -= bytes;
    }

    const std::uint8_t *data_;
    std::size_t size_;
};

}  // namespace fuzz
