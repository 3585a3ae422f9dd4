// Compiled once for every instruction set, with KERNELS (its name) defined.
#include "lattice_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace checkpoint {

namespace {

constexpr float kRounding = 1e-5f;         // by how much fp32 arithmetic may exceed a bound, of it and of the value
constexpr float kToNearest = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, to even at a half
constexpr float kOctave = 8388608.0f;
constexpr std::int32_t kLeastKey = 1 << 23, kMostKey = (0xFE << 23) - 1;  // of normal numbers
constexpr std::int32_t kInfinity = 0xFF << 23, kOne = 127 << 23, kTooFar = 0x42FF0000;  // 127.5

inline std::int32_t pattern(float value) {
    std::int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float number(std::int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Magnitudes compare as integers, with Inf and NaN above all numbers; vectors want all conditions of one kind.
inline std::int32_t magnitude(float value) { return pattern(value) & 0x7FFFFFFF; }

inline std::int32_t all_of(bool a, bool b, bool c) { return (a ? 1 : 0) & (b ? 1 : 0) & (c ? 1 : 0); }

// Whole steps; 0 up to a whole one. Anything where `away` is not small.
inline float steps_of(float away) {
    const float nearest = (away + kToNearest) - kToNearest;
    return magnitude(away) <= kOne ? 0.0f : nearest;
}

void cut_linear(const float *values, const LatticeRow &row, std::uint8_t *symbols, float *reconstruction) {
    const float *const predictions = row.predictions, *const references = row.references;
    const float step = row.step;
    const std::size_t columns = row.columns;
#pragma GCC ivdep
    for (std::size_t i = 0; i < columns; ++i) {
        const float value = values[i], prediction = predictions[i], width = references[i] * step;
        const float away = (value - prediction) / width;
        const std::int32_t found =
            all_of(magnitude(away) < kTooFar, magnitude(value) < kInfinity, magnitude(width) < kInfinity);
        const float steps = found != 0 ? steps_of(away) : 0.0f;
        const float joined = steps * width + prediction;
        const float error = std::fabs(value - joined), most = width * (1 + kRounding) + kRounding * std::fabs(value);
        const std::int32_t near = magnitude(error) <= magnitude(most) ? found : 0;
        const std::int32_t symbol = static_cast<std::int32_t>(steps) + kLatticeLargest;
        symbols[i] = static_cast<std::uint8_t>(near != 0 ? symbol : kLatticeEscape);
        reconstruction[i] = near != 0 ? joined : value;
    }
}

void join_linear(const std::uint8_t *symbols, const LatticeRow &row, float *values) {
    const float *const predictions = row.predictions, *const references = row.references;
    const float step = row.step;
    const std::size_t columns = row.columns;
#pragma GCC ivdep
    for (std::size_t i = 0; i < columns; ++i) {
        const float width = references[i] * step;
        values[i] = static_cast<float>(static_cast<std::int32_t>(symbols[i]) - kLatticeLargest) * width + predictions[i];
    }
}

// The key `steps` steps away, cut to those of normal numbers without leaving 32 bits.
inline std::int32_t moved(std::int32_t key, std::int32_t steps, std::int32_t units, std::int32_t most_steps) {
    const std::int32_t size = steps < 0 ? -steps : steps;
    const std::int32_t distance = size <= most_steps ? std::min(size, most_steps) * units : kMostKey;
    const std::int32_t up = std::min(key, kMostKey - distance) + distance;
    const std::int32_t down = std::max(key, kLeastKey + distance) - distance;
    return std::min(std::max(steps < 0 ? down : up, kLeastKey), kMostKey);
}

void cut_octaves(const float *values, const LatticeRow &row, std::uint8_t *symbols, float *reconstruction) {
    const float *const predictions = row.predictions;
    const float step = row.step, bound = step + kRounding;
    const std::int32_t units = row.units, most_steps = kMostKey / units;
    const std::size_t columns = row.columns;
#pragma GCC ivdep
    for (std::size_t i = 0; i < columns; ++i) {
        const std::int32_t key = std::max(pattern(values[i]), kLeastKey), predicted = pattern(predictions[i]) & 0x7FFFFFFF;
        const float away = static_cast<float>(key - predicted) / kOctave / step;
        const std::int32_t found = all_of(magnitude(away) < kTooFar, magnitude(values[i]) < kInfinity, true);
        const float steps = found != 0 ? steps_of(away) : 0.0f;
        const std::int32_t whole = static_cast<std::int32_t>(steps);
        const std::int32_t joined = moved(predicted, whole, units, most_steps);
        const float error = std::fabs(static_cast<float>(key - joined)) / kOctave;
        const std::int32_t near = magnitude(error) <= magnitude(bound) ? found : 0;
        symbols[i] = static_cast<std::uint8_t>(near != 0 ? whole + kLatticeLargest : kLatticeEscape);
        reconstruction[i] = number(near != 0 ? joined : key);
    }
}

void join_octaves(const std::uint8_t *symbols, const LatticeRow &row, float *values) {
    const float *const predictions = row.predictions;
    const std::int32_t units = row.units, most_steps = kMostKey / units;
    const std::size_t columns = row.columns;
#pragma GCC ivdep
    for (std::size_t i = 0; i < columns; ++i) {
        const std::int32_t predicted = pattern(predictions[i]) & 0x7FFFFFFF;
        values[i] = number(moved(predicted, static_cast<std::int32_t>(symbols[i]) - kLatticeLargest, units, most_steps));
    }
}

void contexts_of(std::int32_t row, const std::int32_t *spread, std::size_t columns, std::uint8_t *contexts) {
#pragma GCC ivdep
    for (std::size_t i = 0; i < columns; ++i) {
        const std::int32_t context = ((row + spread[i]) >> 2) + kLatticeContexts / 2;
        contexts[i] = static_cast<std::uint8_t>(std::min(std::max(context, 0), kLatticeContexts - 1));
    }
}

}  // namespace

namespace KERNELS {
extern const LatticeKernelTable lattice_kernels;
const LatticeKernelTable lattice_kernels = {
    {&cut_linear, &join_linear}, {&cut_octaves, &join_octaves}, &contexts_of};
}  // namespace KERNELS

}  // namespace checkpoint
