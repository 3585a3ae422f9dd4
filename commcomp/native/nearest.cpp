// Compiled once for every instruction set, with KERNELS (its name) and LANES (floats in a vector) defined, and without
// contraction: every instruction set finds the same leaders.
#include "nearest.hpp"

#include <algorithm>
#include <vector>

#include "vectors.hpp"

namespace {

constexpr int kVectors = nearest::kGroup / LANES;
// After so many coordinates it is looked whether any leader of the group is still near enough.
constexpr std::ptrdiff_t kLook = 16;

// Whether a lane is at most `most`; what is not a number is not.
inline bool any_within(const Vector *sums, float most) {
    const Vector bound = all(most);
    auto within = sums[0] <= bound;
    for (int index = 1; index < kVectors; ++index) within |= sums[index] <= bound;
    std::uint64_t words[sizeof within / 8], any = 0;
    std::memcpy(words, &within, sizeof within);
    for (const std::uint64_t word : words) any |= word;
    return any != 0;
}

// distances[i] = |row - leader i of the group|^2; a group is [length][kGroup]. False, and no distances, where none is
// at most `most`: sums of squares only grow, also as they are rounded.
inline bool distances_to_group(const float *row, const float *group, std::ptrdiff_t length, float most,
                               float *distances) {
    Vector sums[kVectors] = {};
    for (std::ptrdiff_t begin = 0; begin < length; begin += kLook) {
        for (std::ptrdiff_t at = begin; at < std::min(begin + kLook, length); ++at) {
            const Vector value = all(row[at]);
            for (int index = 0; index < kVectors; ++index) {
                const Vector apart = value - load(group + at * nearest::kGroup + index * LANES);
                sums[index] += apart * apart;
            }
        }
        if (!any_within(sums, most)) return false;
    }
    for (int index = 0; index < kVectors; ++index) store(distances + index * LANES, sums[index]);
    return true;
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
            if (!distances_to_group(values, scratch + first * length, length, best < 0 ? reach[row] : least, distances))
                continue;
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
