// Byte symbols under given contexts, by one of two coders: rans.hpp ("fast") or mixing.hpp ("max").
#pragma once

#include <cstddef>
#include <cstdint>

#include "mixing.hpp"
#include "rans.hpp"

namespace checkpoint {

// At the end of `out`. `columns`: 0 for "fast"; else "max", for which the symbols are a matrix of that many columns.
inline void encode_symbols(const std::uint8_t *symbols, const std::uint8_t *contexts, std::size_t count,
                           unsigned num_contexts, std::size_t columns, Output &out) {
    if (columns == 0)
        encode_rans(symbols, contexts, count, num_contexts, out);
    else
        encode_mixed(symbols, contexts, count, num_contexts, columns, out);
}

// By whichever coder made them: the first byte tells.
inline void decode_symbols(const std::uint8_t *data, std::size_t size, const std::uint8_t *contexts, std::size_t count,
                           unsigned num_contexts, std::uint8_t *symbols) {
    if (count > 0 && size > 0 && data[0] == 0)
        decode_mixed(data, size, contexts, count, num_contexts, symbols);
    else
        decode_rans(data, size, contexts, count, num_contexts, symbols);
}

}  // namespace checkpoint
