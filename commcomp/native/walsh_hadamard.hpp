// The fast Walsh-Hadamard transform in place: log2(size) rounds of sums and differences, distances 1, 2, 4, ... in this
// order whatever LANES is, so that every instruction set gives the same bits (Fino and Algazi 1976).
#pragma once

#include "vectors.hpp"

namespace {

typedef int Places __attribute__((vector_size(LANES * sizeof(int))));

// value[lane ^ Distance] in every lane.
template <int Distance, std::size_t... Lane>
inline Vector exchanged(Vector value, std::index_sequence<Lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(value, value, (static_cast<int>(Lane) ^ Distance)...);
#else
    return __builtin_shuffle(value, Places{(static_cast<int>(Lane) ^ Distance)...});
#endif
}

template <int Distance, std::size_t... Lane>
inline Vector signs_of_lanes(std::index_sequence<Lane...>) {
    return Vector{(Lane & Distance ? -1.0f : 1.0f)...};
}

// The rounds at distances Distance, 2 Distance, ... below LANES, within one vector.
template <int Distance>
inline Vector rounds_within(Vector value) {
    if constexpr (Distance < LANES) {
        constexpr std::make_index_sequence<LANES> lanes{};
        value = exchanged<Distance>(value, lanes) + value * signs_of_lanes<Distance>(lanes);
        return rounds_within<2 * Distance>(value);
    }
    return value;
}

// `size` is a power of 2.
inline void walsh_hadamard(float *values, std::ptrdiff_t size) {
    if (size < LANES) {
        for (std::ptrdiff_t distance = 1; distance < size; distance *= 2)
            for (std::ptrdiff_t at = 0; at < size; ++at)
                if (!(at & distance)) {
                    const float left = values[at], right = values[at + distance];
                    values[at] = left + right;
                    values[at + distance] = left - right;
                }
        return;
    }
    for (std::ptrdiff_t at = 0; at < size; at += LANES) store(values + at, rounds_within<1>(load(values + at)));
    for (std::ptrdiff_t distance = LANES; distance < size; distance *= 2)
        for (std::ptrdiff_t start = 0; start < size; start += 2 * distance)
            for (std::ptrdiff_t at = start; at < start + distance; at += LANES) {
                const Vector left = load(values + at), right = load(values + at + distance);
                store(values + at, left + right);
                store(values + at + distance, left - right);
            }
}

}  // namespace
