// Leaders among rows by their distances, as commcomp/compressors/nearest.py defines them.
#pragma once

#include <cstddef>
#include <cstdint>

struct NearestKernels {
    // Rows begin..end of `rows` [..., length], compared with one another: leaders[k] is the nearest earlier row that leads
    // itself and lies within the squared distance reach[k], or k. `scratch` holds nearest::scratch(end - begin, length).
    void (*leaders)(const float *rows, std::ptrdiff_t length, const float *reach, std::ptrdiff_t begin,
                    std::ptrdiff_t end, std::int64_t *leaders, float *scratch);
};

namespace nearest {

extern const NearestKernels plain, avx2;

// Leaders lie side by side in groups of at most so many.
constexpr std::ptrdiff_t kGroup = 32;

constexpr std::ptrdiff_t scratch(std::ptrdiff_t rows, std::ptrdiff_t length) {
    return (rows + kGroup - 1) / kGroup * kGroup * length;
}

}  // namespace nearest
