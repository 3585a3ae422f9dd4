// The largest values of a row and where they lie, as commcomp/compressors/wire_sparse.py defines them, to the bit.
#pragma once

#include <cstddef>
#include <cstdint>

// Positions go by blocks of 256: a count and offsets of one byte each, or a bitmap, the first position in the lowest
// bit.
constexpr std::ptrdiff_t kSparseBlock = 256;

// Where the positions of a row of `length` values lie: counts (one a block) and offsets [capacity], or bitmap
// [ceil(length / 8)] bytes and null for the others.
struct SparsePlaces {
    std::ptrdiff_t length, capacity;
    std::uint8_t *counts, *offsets, *bitmap;
};

// What decoding reads and writes: `ranks` encoded rows, their positions `distance` bytes apart, with values
// [ranks, capacity]; `total` [length], or null.
struct SparseRows {
    SparsePlaces first;
    std::ptrdiff_t ranks, distance;
    const float *values, *total;
    float *out;
};

// One instruction set's passes over blocks [begin, end) of one row.
struct SparseKernels {
    // How many magnitudes reach `threshold`; a block of 256 gives 255 at most if positions go `by_offsets`.
    std::ptrdiff_t (*count)(const float *values, std::ptrdiff_t length, float threshold, bool by_offsets,
                            std::ptrdiff_t begin, std::ptrdiff_t end);
    // Puts their positions, and the values into `chosen`, from place `start` on, as far as there are places. Returns
    // whether one of them, place or not, was Inf or NaN.
    bool (*select)(const float *values, float threshold, const SparsePlaces &places, std::ptrdiff_t start,
                   std::ptrdiff_t begin, std::ptrdiff_t end, float *chosen);
    // out = the mean over ranks, added in order; with `total`, total minus it. `used` [ranks] holds the places taken
    // in earlier blocks and is moved on.
    void (*decode)(const SparseRows &, std::ptrdiff_t *used, std::ptrdiff_t begin, std::ptrdiff_t end);
};

namespace sparse_codec {
extern const SparseKernels plain;
#if defined(COMMCOMP_X86)
extern const SparseKernels avx2;
#endif
}  // namespace sparse_codec
