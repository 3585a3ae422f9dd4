// int8 rows with one fp32 scale each, as commcomp/compressors/wire.py defines them, to the bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace row_codec {

// codes [rows, length] and scales [rows] of `values` [rows, length]: scale = max|row| / 127, codes to nearest even. A row
// too small for a normal scale gets 1 and zeros, one with Inf or NaN gets NaN and zeros.
void encode(const float *values, std::ptrdiff_t rows, std::ptrdiff_t length, std::int8_t *codes, float *scales);

// out [rows, length] = codes * scale.
void decode(const std::int8_t *codes, const float *scales, std::ptrdiff_t rows, std::ptrdiff_t length, float *out);

// out = the mean of `ranks` such blocks, added in order; each lies `stride` bytes after the one before.
void decode_mean(const std::int8_t *codes, const float *scales, std::ptrdiff_t ranks, std::ptrdiff_t stride,
                 std::ptrdiff_t rows, std::ptrdiff_t length, float *out);

}  // namespace row_codec
