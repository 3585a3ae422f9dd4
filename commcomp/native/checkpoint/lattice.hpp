// Matrices on a lattice around what is known of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace checkpoint {

struct LatticeKnowledge {
    bool octaves;
    const float *predictions, *references;  // [rows, columns]; null: 0, and 1, everywhere
    float step;
    std::size_t rows, columns;
};

// Symbols and what a decoder makes of them, within a step; kLatticeEscape where that cannot be.
void cut_on_lattice(const float *values, const LatticeKnowledge &known, std::uint8_t *symbols, float *reconstruction);
void join_on_lattice(const std::uint8_t *symbols, const LatticeKnowledge &known, float *values);

// By the spread of rows and columns; `base` is that of the middle context.
void lattice_contexts(const std::int32_t *row_spread, const std::int32_t *column_spread, std::int32_t base,
                      std::size_t rows, std::size_t columns, std::uint8_t *contexts);

}  // namespace checkpoint
