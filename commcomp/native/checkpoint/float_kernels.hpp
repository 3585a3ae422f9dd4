// The loops over values that are vectors where the machine has them: compiled once an instruction set, the same source, so
// that all give the same bits.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "float_codec.hpp"

namespace checkpoint {

constexpr std::size_t kBlock = 2048;

// What is known of a block of values: fp32 numbers, at any address.
struct BlockKnowledge {
    const void *predictions, *scales;
    unsigned resolution;
};

// Low bits of a block of values, and how many they are.
struct LowBits {
    alignas(64) std::array<std::uint32_t, kBlock> low, count;
};

struct FloatKernels {
    // A block of at most kBlock values (words of the format, at any address): symbols, contexts, low bits.
    void (*cut)(const void *values, const BlockKnowledge &known, std::size_t count, std::uint8_t *symbols,
                std::uint8_t *contexts, LowBits &low);
    // Contexts alone.
    void (*contexts)(const BlockKnowledge &known, std::size_t count, std::uint8_t *contexts);
};

// [format][cut]
using FloatKernelTable = std::array<std::array<FloatKernels, 3>, 2>;

namespace plain {
extern const FloatKernelTable float_kernels;
}
namespace avx2 {
extern const FloatKernelTable float_kernels;
}

}  // namespace checkpoint
