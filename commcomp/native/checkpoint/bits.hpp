// Bits of up to 56 a time in a row, least significant first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "buffer.hpp"

namespace checkpoint {

// The i-th of words that may stand at any address.
template <typename Word>
inline Word word_at(const void *words, std::size_t i) {
    Word word;
    std::memcpy(&word, static_cast<const std::uint8_t *>(words) + i * sizeof word, sizeof word);
    return word;
}

template <typename Word>
inline void put_word_at(void *words, std::size_t i, Word word) {
    std::memcpy(static_cast<std::uint8_t *>(words) + i * sizeof word, &word, sizeof word);
}

inline std::uint64_t load64(const std::uint8_t *from) {
    std::uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Adds bits to an output; what else is added to it comes before the first bit or after `finish`.
class BitWriter {
  public:
    BitWriter(Output &out) : out_(out), end_(out.size()) {}

    // Room for `bits` more; without it `put` must not be called.
    void reserve(std::size_t bits) { bytes_ = out_.buffer().room(end_, bits / 8 + 16); }

    void put(std::uint64_t value, unsigned count) {
        pending_ |= value << fill_;
        fill_ += count;
        std::memcpy(bytes_ + end_, &pending_, 8);
        end_ += fill_ >> 3;
        pending_ = (fill_ >> 3) >= 8 ? 0 : pending_ >> (fill_ & ~7u);
        fill_ &= 7;
    }

    // Elias's gamma code of a value of at least 1.
    void put_gamma(std::uint32_t value) {
        const unsigned length = 31 - static_cast<unsigned>(__builtin_clz(value));
        put(0, length);
        put(1, 1);
        put(value & ((1u << length) - 1), length);
    }

    // Fills up the last byte with zeros.
    void finish() {
        if (fill_ > 0) {
            reserve(8);
            bytes_[end_++] = static_cast<std::uint8_t>(pending_);
        }
        out_.resize(end_);
        pending_ = 0;
        fill_ = 0;
    }

  private:
    Output &out_;
    std::uint8_t *bytes_ = nullptr;
    std::size_t end_;
    std::uint64_t pending_ = 0;
    unsigned fill_ = 0;
};

// Never reads beyond `size` bytes: throws std::invalid_argument instead.
class BitReader {
  public:
    BitReader(const std::uint8_t *data, std::size_t size) : data_(data), bits_(8 * static_cast<std::uint64_t>(size)) {}

    std::uint64_t take(unsigned count) {
        if (at_ + count > bits_) throw std::invalid_argument("bits end early");
        const std::uint64_t value = peek() & ((std::uint64_t{1} << count) - 1);
        at_ += count;
        return value;
    }

    // Whether `count` bits and eight bytes more can be read without a look at the end.
    bool far_from_end(std::uint64_t count) const { return at_ + count + 64 <= bits_; }

    // As `take`, only after `far_from_end`.
    std::uint64_t take_unchecked(unsigned count) {
        const std::uint64_t value = (load64(data_ + (at_ >> 3)) >> (at_ & 7)) & ((std::uint64_t{1} << count) - 1);
        at_ += count;
        return value;
    }

    std::uint64_t take_if(unsigned count, bool safe) { return safe ? take_unchecked(count) : take(count); }

    std::uint32_t take_gamma() {
        unsigned length = 0;
        while (take(1) == 0)
            if (++length > 31) throw std::invalid_argument("a gamma code is longer than 31 bits");
        return (1u << length) | static_cast<std::uint32_t>(take(length));
    }

    // Whether all was read but for the zeros that fill the last byte.
    bool at_end() { return bits_ - at_ < 8 && take(static_cast<unsigned>(bits_ - at_)) == 0; }

    std::size_t bytes_used() const { return static_cast<std::size_t>((at_ + 7) >> 3); }

  private:
    std::uint64_t peek() const {
        const std::size_t byte = static_cast<std::size_t>(at_ >> 3), size = static_cast<std::size_t>(bits_ >> 3);
        std::uint64_t value = 0;
        std::memcpy(&value, data_ + byte, size - byte < 8 ? size - byte : 8);
        return value >> (at_ & 7);
    }

    const std::uint8_t *data_;
    std::uint64_t bits_, at_ = 0;
};

}  // namespace checkpoint
