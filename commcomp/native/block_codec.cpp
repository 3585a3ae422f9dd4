// Compiled once for every instruction set, with KERNELS (its name) and LANES (floats in a vector) defined, and without
// contraction: a product and a sum round one by one here, as in torch's operations.
#include "block_codec.hpp"

#include <cmath>
#include <cstring>

#include "walsh_hadamard.hpp"

namespace {

constexpr float kToNearest = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, to even at a half
constexpr std::uint32_t kInfinity = 0x7F800000u, kSmallestNormal = 0x00800000u, kOne = 0x3F800000u;
constexpr std::uint16_t kNotANumber = 0x7FC0u;  // in bf16

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline std::int32_t within(std::int32_t code, std::int32_t levels) {
    code = code > levels ? levels : code;
    return code < -levels ? -levels : code;
}

// Largest magnitude: their bits are ordered as they are, with NaN above Inf, so a plain maximum finds bad numbers too.
inline float largest_of(const float *values, std::ptrdiff_t count) {
    std::int32_t largest = 0;
    for (std::ptrdiff_t at = 0; at < count; ++at) {
        const std::int32_t one = static_cast<std::int32_t>(bits_of(values[at]) & 0x7FFFFFFFu);
        largest = one > largest ? one : largest;
    }
    return float_of(static_cast<std::uint32_t>(largest));
}

struct NearestCode {
    float scale;
    std::int32_t levels;
    std::int32_t operator()(float value, std::uint32_t) const {
        return within(static_cast<std::int32_t>((value / scale + kToNearest) - kToNearest), levels);
    }
};

// Down or up with the right expectation. The uniform number for a place is a hash of it and of the block's key: two
// rounds of multiplying and folding, as MurmurHash3 ends, with the constants that Wellons' hash-prospector found.
struct RandomCode {
    float scale;
    std::int32_t levels;
    std::uint32_t first_key, second_key;
    std::int32_t operator()(float value, std::uint32_t place) const {
        std::uint32_t hash = place * 0x9E3779B9u + first_key;
        hash = (hash ^ (hash >> 16)) * 0x7FEB352Du + second_key;
        hash = (hash ^ (hash >> 15)) * 0x846CA68Bu;
        hash ^= hash >> 16;
        // 16 bits and a half: the sum with a whole code up to 127 is then exact, and stays below the next one.
        const float noise = (static_cast<float>(static_cast<std::int32_t>(hash >> 16)) + 0.5f) * 0x1p-16f;
        const float moved = value / scale + noise;
        const float nearest = (moved + kToNearest) - kToNearest;
        return within(static_cast<std::int32_t>(nearest) - (nearest > moved ? 1 : 0), levels);
    }
};

// A key for every block: splitmix64 (Steele, Lea and Flood 2014) of seed and number.
inline std::uint64_t key_of(std::uint64_t seed, std::ptrdiff_t number) {
    std::uint64_t key = seed + (static_cast<std::uint64_t>(number) + 1) * 0x9E3779B97F4A7C15u;
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
    return key ^ (key >> 31);
}

template <typename Code>
inline void put_codes(const float *__restrict values, std::ptrdiff_t block, int bits, Code code,
                      std::uint8_t *__restrict out, std::int8_t *__restrict whole) {
    std::int8_t *const bytes = bits == 8 ? reinterpret_cast<std::int8_t *>(out) : whole;
    for (std::ptrdiff_t at = 0; at < block; ++at)
        bytes[at] = static_cast<std::int8_t>(code(values[at], static_cast<std::uint32_t>(at)));
    if (bits == 8) return;
    for (std::ptrdiff_t at = 0; at < block / 2; ++at)
        out[at] = static_cast<std::uint8_t>((whole[2 * at] & 0xF) | (static_cast<std::uint8_t>(whole[2 * at + 1]) << 4));
}

inline void rotate(float *__restrict values, const float *__restrict signs, std::ptrdiff_t block) {
    const float weight = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
    for (std::ptrdiff_t at = 0; at < block; ++at) values[at] *= signs[at];
    walsh_hadamard(values, block);
    for (std::ptrdiff_t at = 0; at < block; ++at) values[at] *= weight;
}

inline void rotate_back(float *__restrict values, const float *__restrict signs, std::ptrdiff_t block) {
    const float weight = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
    walsh_hadamard(values, block);
    for (std::ptrdiff_t at = 0; at < block; ++at) values[at] *= weight * signs[at];
}

void encode_one(const BlockCode &code, const float *values, std::uint32_t mask, const std::uint64_t *seed,
                std::ptrdiff_t number, std::uint8_t *out, std::uint16_t *scale_out, std::int8_t *whole) {
    const std::int32_t levels = code.bits == 8 ? 127 : 7;
    const std::uint32_t exact = bits_of(largest_of(values, code.block) / static_cast<float>(levels));
    std::uint32_t scale_bits = (exact + mask) & ~mask;
    if (exact >= kInfinity || scale_bits >= kInfinity) {
        *scale_out = kNotANumber;
        std::memset(out, 0, code.block * code.bits / 8);
        return;
    }
    if (scale_bits < kSmallestNormal) scale_bits = kOne;  // zeros, or too small for an accurate scale: sent as 0
    *scale_out = static_cast<std::uint16_t>(scale_bits >> 16);
    const float scale = float_of(scale_bits);
    if (seed == nullptr) {
        put_codes(values, code.block, code.bits, NearestCode{scale, levels}, out, whole);
    } else {
        const std::uint64_t key = key_of(*seed, number);
        const RandomCode random{scale, levels, static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)};
        put_codes(values, code.block, code.bits, random, out, whole);
    }
}

void encode(const BlockCode &code, const float *values, std::ptrdiff_t stride, std::uint32_t mask,
            const std::uint64_t *seed, std::uint8_t *codes, std::uint16_t *scales, std::ptrdiff_t begin,
            std::ptrdiff_t end, float *scratch) {
    const std::ptrdiff_t in_row = (code.length + code.block - 1) / code.block;
    std::int8_t *const whole = reinterpret_cast<std::int8_t *>(scratch + code.block);
    for (std::ptrdiff_t number = begin; number < end; ++number) {
        const std::ptrdiff_t start = number % in_row * code.block;
        const std::ptrdiff_t rest = code.length - start, count = rest < code.block ? rest : code.block;
        const float *from = values + number / in_row * stride + start;
        if (count < code.block || code.signs != nullptr) {
            std::memcpy(scratch, from, count * sizeof(float));
            std::memset(scratch + count, 0, (code.block - count) * sizeof(float));
            if (code.signs != nullptr) rotate(scratch, code.signs, code.block);
            from = scratch;
        }
        encode_one(code, from, mask, seed, number, codes + number * code.block * code.bits / 8, scales + number, whole);
    }
}

// The codes of one block as whole numbers; for 8 bits where they lie.
inline const std::int8_t *codes_of(const std::uint8_t *__restrict stored, std::ptrdiff_t block, int bits,
                                   std::int8_t *__restrict whole) {
    if (bits == 8) return reinterpret_cast<const std::int8_t *>(stored);
    for (std::ptrdiff_t at = 0; at < block / 2; ++at) {
        whole[2 * at] = static_cast<std::int8_t>(((stored[at] & 0xF) ^ 8) - 8);
        whole[2 * at + 1] = static_cast<std::int8_t>(((stored[at] >> 4) ^ 8) - 8);
    }
    return whole;
}

inline void put_values(float *__restrict sum, const std::int8_t *__restrict steps, float scale, std::ptrdiff_t block,
                       bool add) {
    if (add)
        for (std::ptrdiff_t at = 0; at < block; ++at) sum[at] += static_cast<float>(steps[at]) * scale;
    else
        for (std::ptrdiff_t at = 0; at < block; ++at) sum[at] = static_cast<float>(steps[at]) * scale;
}

inline float scale_at(const std::uint8_t *scales, std::ptrdiff_t number) {
    std::uint16_t high;
    std::memcpy(&high, scales + 2 * number, sizeof high);
    return float_of(static_cast<std::uint32_t>(high) << 16);
}

void decode(const BlockCode &code, const std::uint8_t *codes, const std::uint8_t *scales, std::ptrdiff_t ranks,
            std::ptrdiff_t distance, const float *total, std::ptrdiff_t total_stride, float *out,
            std::ptrdiff_t out_stride, std::ptrdiff_t begin, std::ptrdiff_t end, float *scratch) {
    const std::ptrdiff_t block = code.block, length = code.length, block_bytes = block * code.bits / 8;
    const std::ptrdiff_t in_row = (length + block - 1) / block;
    std::int8_t *const whole = reinterpret_cast<std::int8_t *>(scratch + block);
    const float divisor = static_cast<float>(ranks);
    for (std::ptrdiff_t number = begin; number < end; ++number) {
        const std::ptrdiff_t row = number / in_row, start = number % in_row * block;
        const std::ptrdiff_t rest = length - start, count = rest < block ? rest : block;
        float *const to = out + row * out_stride + start;
        // A whole block from which nothing more is made is summed where it goes.
        float *const sum = count == block && code.signs == nullptr && total == nullptr ? to : scratch;
        for (std::ptrdiff_t rank = 0; rank < ranks; ++rank) {
            const std::uint8_t *const stored = codes + rank * distance + number * block_bytes;
            const float scale = scale_at(scales + rank * distance, number);
            put_values(sum, codes_of(stored, block, code.bits, whole), scale, block, rank > 0);
        }
        if (ranks > 1)
            for (std::ptrdiff_t at = 0; at < block; ++at) sum[at] /= divisor;
        if (code.signs != nullptr) rotate_back(sum, code.signs, block);
        if (total != nullptr) {
            const float *const from = total + row * total_stride + start;
            for (std::ptrdiff_t at = 0; at < count; ++at) to[at] = from[at] - sum[at];
        } else if (sum != to) {
            std::memcpy(to, sum, count * sizeof(float));
        }
    }
}

}  // namespace

namespace block_codec {
extern const BlockKernels KERNELS{encode, decode};
}
