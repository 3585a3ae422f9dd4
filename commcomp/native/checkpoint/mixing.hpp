// The coder "max": byte symbols as binary decisions, each predicted from several contexts whose predictions are mixed by
// online logistic regression (Mahoney 2005, "Adaptive weighing of context models for lossless data compression"), and
// coded arithmetically. All in integers, so that every machine decodes alike.
//
// A stream: a byte 0, which no stream of rans.hpp begins with; the number of columns, four bytes; the most common symbol;
// the bytes of the arithmetic coder.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.hpp"

namespace checkpoint {

// At the end of `out`. The symbols are a matrix with `columns` columns; `contexts` as of rans.hpp.
void encode_mixed(const std::uint8_t *symbols, const std::uint8_t *contexts, std::size_t count, unsigned num_contexts,
                  std::size_t columns, Output &out);

// Exactly `count` (not 0) symbols from exactly `size` bytes; std::invalid_argument for what cannot be read.
void decode_mixed(const std::uint8_t *data, std::size_t size, const std::uint8_t *contexts, std::size_t count,
                  unsigned num_contexts, std::uint8_t *symbols);

}  // namespace checkpoint
