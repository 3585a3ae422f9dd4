// Byte symbols under given contexts, by interleaved range asymmetric numeral systems (Duda 2013) with static tables.
//
// A stream: a byte with the number of tables; a byte a context with its table, where there is more than one; the tables;
// then eight lanes' states, four bytes each, and words of two bytes in the order in which a decoder takes them. Symbol i
// belongs to lane i modulo 8.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.hpp"

namespace checkpoint {

// At the end of `out`. `contexts` (below `num_contexts`, 255 at most) may be null where there is only one.
void encode_rans(const std::uint8_t *symbols, const std::uint8_t *contexts, std::size_t count, unsigned num_contexts,
                 Output &out);

// Exactly `count` symbols from exactly `size` bytes; std::invalid_argument for anything that encode_rans cannot have
// made of symbols in these contexts.
void decode_rans(const std::uint8_t *data, std::size_t size, const std::uint8_t *contexts, std::size_t count,
                 unsigned num_contexts, std::uint8_t *symbols);

}  // namespace checkpoint
