// Floating-point values, given what is known of each before it is read: a prediction, a scale, both or none. Bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.hpp"

namespace checkpoint {

enum class Format { fp32, bf16 };

// How values are cut into a symbol, which is entropy coded, and low bits, which go as they are.
enum class Cut {
    // Cells of a width of about scale / 2^resolution, a power of two, over the real line; the symbol counts cells from
    // the prediction's. Where a unit in the last place is wider than a cell, it counts those units.
    linear,
    // The symbol is the binary logarithm of |value| / scale, in eighths, and the sign. No prediction.
    logarithmic,
    // The symbol counts 2^resolution units in the last place from the prediction. No scale.
    relative,
};

struct Knowledge {
    Cut cut;
    const float *predictions;  // null: 0 everywhere
    const float *scales;       // null: `scale` everywhere
    float scale;
    unsigned resolution;  // linear: 1 to 5; relative: below the mantissa's bits
};

// At the end of `out`. Values, predictions and scales may stand at any address.
// `columns`: of symbols.hpp.
void encode_floats(Format format, const void *values, std::size_t count, const Knowledge &known, std::size_t columns,
                   Output &out);

// std::invalid_argument where `data` is nothing that encode_floats made with this knowledge and count.
void decode_floats(Format format, const std::uint8_t *data, std::size_t size, std::size_t count,
                   const Knowledge &known, void *values);

}  // namespace checkpoint
