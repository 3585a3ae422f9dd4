// Compiled once for every instruction set, with KERNELS (its name) and LANES (floats in a vector) defined, and without
// contraction: every instruction set finds the same leaders.
#include "nearest.hpp"

#include <vector>

#include "vectors.hpp"

namespace {

constexpr int kVectors = nearest::kGroup / LANES;

// distances[i] = |row - leader i of the group|^2; a group is [length][kGroup].
inline void distances_to_group(const float *row, const float *group, std::ptrdiff_t length, float *distances) {
    Vector sums[kVectors] = {};
    for (std::ptrdiff_t at = 0; at < length; ++at) {
        const Vector value = all(row[at]);
        for (int index = 0; index < kVectors; ++index) {
            const Vector apart = value - load(group + at * nearest::kGroup + index * LANES);
            sums[index] += apart * apart;
        }
    }
    for (int index = 0; index < kVectors; ++index) store(distances + index * LANES, sums[index]);
}

void leaders(const float *rows, std::ptrdiff_t length, const float *reach, std::ptrdiff_t begin, std::ptrdiff_t end,
             std::int64_t *leaders, float *scratch) {
    std::vector<std::int64_t> known;
    float distances[nearest::kGroup];
    for (std::ptrdiff_t row = begin; row < end; ++row) {
        const float *const values = rows + row * length;
        const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(known.size());
        std::int64_t best = -1;
        float least = 0;
        for (std::ptrdiff_t first = 0; first < count; first += nearest::kGroup) {
            distances_to_group(values, scratch + first * length, length, distances);
            const std::ptrdiff_t filled = count - first < nearest::kGroup ? count - first : nearest::kGroup;
            for (std::ptrdiff_t lane = 0; lane < filled; ++lane)
                if (distances[lane] <= reach[row] && (best < 0 || distances[lane] < least)) {
                    best = known[first + lane];
                    least = distances[lane];
                }
        }
        leaders[row] = best < 0 ? row : best;
        if (best >= 0) continue;
        float *const group = scratch + count / nearest::kGroup * nearest::kGroup * length + count % nearest::kGroup;
        for (std::ptrdiff_t at = 0; at < length; ++at) group[at * nearest::kGroup] = values[at];
        known.push_back(row);
    }
}

}  // namespace

namespace nearest {

extern const NearestKernels KERNELS{leaders};

}  // namespace nearest
