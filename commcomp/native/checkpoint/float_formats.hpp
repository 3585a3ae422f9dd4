// The bit patterns of floating-point formats as integers in the order of the values.
#pragma once

#include <cstdint>

#include "float_codec.hpp"

namespace checkpoint {

struct Fp32 {
    static constexpr Format kFormat = Format::fp32;
    using Word = std::uint32_t;
    static constexpr unsigned kBits = 32, kMantissa = 23;
    // An fp32 pattern in this format.
    static std::uint32_t round(std::uint32_t bits) { return bits; }
    // Where between two neighbours of this format it lies, in quarters.
    static constexpr unsigned kFractions = 1;
    static std::uint32_t fraction(std::uint32_t) { return 0; }
};

struct Bf16 {
    static constexpr Format kFormat = Format::bf16;
    using Word = std::uint16_t;
    static constexpr unsigned kBits = 16, kMantissa = 7;
    static std::uint32_t round(std::uint32_t bits) { return (bits + 0x8000u) >> 16; }
    static constexpr unsigned kFractions = 4;
    static std::uint32_t fraction(std::uint32_t bits) { return ((bits + 0x8000u) >> 14) & 3u; }
};

template <typename F>
constexpr std::uint32_t kSign = 1u << (F::kBits - 1);

// One to one on all patterns, NaN and both zeros included.
template <typename F>
inline std::uint32_t key_of(std::uint32_t bits) {
    return bits & kSign<F> ? bits ^ (kSign<F> | (kSign<F> - 1)) : bits | kSign<F>;
}

template <typename F>
inline std::uint32_t bits_of_key(std::uint32_t key) {
    return key & kSign<F> ? key ^ kSign<F> : key ^ (kSign<F> | (kSign<F> - 1));
}

// Machines differ in the NaN that an operation gives, so none may steer a decoder.
inline std::uint32_t finite_or(std::uint32_t bits, std::uint32_t otherwise) {
    return (bits & 0x7F800000u) == 0x7F800000u ? otherwise : bits;
}

}  // namespace checkpoint
