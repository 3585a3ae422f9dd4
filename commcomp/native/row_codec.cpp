// Compiled without contraction: a product and a sum round one by one here, as in torch's operations.
#include "row_codec.hpp"

#include <cmath>
#include <cstring>
#include <limits>

namespace row_codec {

namespace {

constexpr float kLargest = 127.0f;
constexpr float kToNearest = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, to even at a half

// Bits of |value|: ordered as the magnitudes are, with NaN above Inf, so a plain maximum finds bad numbers too.
inline std::uint32_t magnitude_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFFu;
}

inline const float *advanced(const float *at, std::ptrdiff_t bytes) {
    return reinterpret_cast<const float *>(reinterpret_cast<const char *>(at) + bytes);
}

}  // namespace

void encode(const float *values, std::ptrdiff_t rows, std::ptrdiff_t length, std::int8_t *codes, float *scales) {
    for (std::ptrdiff_t row = 0; row < rows; ++row, values += length, codes += length) {
        std::uint32_t bits = 0;
        for (std::ptrdiff_t at = 0; at < length; ++at) {
            const std::uint32_t one = magnitude_bits(values[at]);
            bits = one > bits ? one : bits;
        }
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        const float scale = largest / kLargest;
        if (!std::isfinite(scale) || scale < std::numeric_limits<float>::min()) {
            scales[row] = std::isfinite(scale) ? 1.0f : std::numeric_limits<float>::quiet_NaN();
            std::memset(codes, 0, length);
            continue;
        }
        scales[row] = scale;
        for (std::ptrdiff_t at = 0; at < length; ++at)
            codes[at] = static_cast<std::int8_t>(
                static_cast<std::int32_t>((values[at] / scale + kToNearest) - kToNearest));
    }
}

void decode(const std::int8_t *codes, const float *scales, std::ptrdiff_t rows, std::ptrdiff_t length, float *out) {
    for (std::ptrdiff_t row = 0; row < rows; ++row, codes += length, out += length)
        for (std::ptrdiff_t at = 0; at < length; ++at) out[at] = static_cast<float>(codes[at]) * scales[row];
}

void decode_mean(const std::int8_t *codes, const float *scales, std::ptrdiff_t ranks, std::ptrdiff_t stride,
                 std::ptrdiff_t rows, std::ptrdiff_t length, float *out) {
    const float count = static_cast<float>(ranks);
    for (std::ptrdiff_t row = 0; row < rows; ++row, codes += length, out += length) {
        for (std::ptrdiff_t at = 0; at < length; ++at) out[at] = static_cast<float>(codes[at]) * scales[row];
        for (std::ptrdiff_t rank = 1; rank < ranks; ++rank) {
            const std::int8_t *const others = codes + rank * stride;
            const float scale = advanced(scales, rank * stride)[row];
            for (std::ptrdiff_t at = 0; at < length; ++at) out[at] += static_cast<float>(others[at]) * scale;
        }
        for (std::ptrdiff_t at = 0; at < length; ++at) out[at] /= count;
    }
}

}  // namespace row_codec
