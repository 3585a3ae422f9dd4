// Frequencies of byte symbols, for a coder whose probabilities are multiples of 1 / 4096.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bits.hpp"

namespace checkpoint {

constexpr unsigned kScaleBits = 12;
constexpr std::uint32_t kScale = 1u << kScaleBits;
constexpr unsigned kMostContexts = 255;

using Counts = std::array<std::uint32_t, 256>;

// Frequencies that add up to kScale; none is 0 where a count is not.
struct Frequencies {
    std::array<std::uint16_t, 256> of{};
};

Frequencies normalise(const Counts &counts);

// Bits that symbols with these counts take under the frequencies made from them, and the table itself.
double cost_with_table(const Counts &counts);

void write_table(const Frequencies &table, BitWriter &out);
Frequencies read_table(BitReader &in);  // std::invalid_argument where they do not add up

// Which contexts share a table: neighbours are merged where that takes fewer bits.
struct TablePlan {
    std::vector<std::uint8_t> table_of;  // by context
    std::vector<Frequencies> tables;
};

TablePlan plan_tables(const std::vector<Counts> &counts);

}  // namespace checkpoint
