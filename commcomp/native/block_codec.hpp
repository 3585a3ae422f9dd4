// Blocks of values with one scale each, in 8 or 4 bits, as commcomp/compressors/wire_blocks.py defines them; to the bit,
// but for rotated blocks (sums in another order than a matrix product's) and for random rounding (other numbers).
#pragma once

#include <cstddef>
#include <cstdint>

// An encoded block of `rows` rows of `length` values, each padded to whole blocks: codes of all of them, then scales.
// Blocks are numbered across rows.
struct BlockCode {
    std::ptrdiff_t rows, length, block;
    int bits;            // 8 or 4
    const float *signs;  // [block] +-1 of the rotation; null: none
};

// One instruction set's passes over blocks [begin, end). All sets give the same bits. `scratch` holds 2 block floats.
struct BlockKernels {
    // codes and scales (bf16) of `values`, rows `stride` floats apart. A scale is rounded up to a number whose bits
    // under `mask` are 0. With `seed` rounding is random: the numbers depend on the seed and the place alone.
    void (*encode)(const BlockCode &, const float *values, std::ptrdiff_t stride, std::uint32_t mask,
                   const std::uint64_t *seed, std::uint8_t *codes, std::uint16_t *scales, std::ptrdiff_t begin,
                   std::ptrdiff_t end, float *scratch);
    // out = the mean of `ranks` encoded blocks, `distance` bytes apart, added in order; with `total`, total minus it.
    // `total` and `out` are rows `total_stride` and `out_stride` floats apart, and may be the same.
    void (*decode)(const BlockCode &, const std::uint8_t *codes, const std::uint8_t *scales, std::ptrdiff_t ranks,
                   std::ptrdiff_t distance, const float *total, std::ptrdiff_t total_stride, float *out,
                   std::ptrdiff_t out_stride, std::ptrdiff_t begin, std::ptrdiff_t end, float *scratch);
};

namespace block_codec {
extern const BlockKernels plain;
#if defined(COMMCOMP_X86)
extern const BlockKernels avx2;
#endif
}  // namespace block_codec
