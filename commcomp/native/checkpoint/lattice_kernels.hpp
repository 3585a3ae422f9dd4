// Values on a lattice around their predictions (commcomp/checkpoint/codec/lattice.py), a row of a matrix at a time: compiled
// once an instruction set, the same source, so that all give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace checkpoint {

constexpr int kLatticeLargest = 127;                // steps from the prediction
constexpr std::uint8_t kLatticeEscape = 255;        // the value is kept as it is
constexpr std::int32_t kLatticeContexts = 16;

// One row: a prediction and a reference for every value.
struct LatticeRow {
    const float *predictions, *references;
    float step;          // times the reference; in octaves
    std::int32_t units;  // a step in keys, of octaves
    std::size_t columns;
};

struct LatticeKernels {
    // Symbols and what a decoder makes of them. A value that would come to lie further than a step away is kept.
    void (*cut)(const float *values, const LatticeRow &row, std::uint8_t *symbols, float *reconstruction);
    // Back; anything where the symbol is kLatticeEscape.
    void (*join)(const std::uint8_t *symbols, const LatticeRow &row, float *values);
};

struct LatticeKernelTable {
    LatticeKernels linear, octaves;
    // By the spread of the row, less that of the middle context, and of the columns.
    void (*contexts)(std::int32_t row, const std::int32_t *spread, std::size_t columns, std::uint8_t *contexts);
};

namespace plain {
extern const LatticeKernelTable lattice_kernels;
}
namespace avx2 {
extern const LatticeKernelTable lattice_kernels;
}

}  // namespace checkpoint
