// Compiled once for every instruction set, with KERNELS (its name) and LANES (floats in a vector) defined, and without
// contraction: a product and a sum round one by one here, as in torch's operations.
#include "sparse_codec.hpp"

#include <cstring>

#if defined(COMMCOMP_X86)
#include <immintrin.h>
#endif

namespace {

constexpr std::int32_t kInfinity = 0x7F800000;
constexpr int kWords = kSparseBlock / 64;

inline std::int32_t magnitude_bits(float value) {
    std::int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x7FFFFFFF;
}

// Bits of magnitudes are ordered as they are, with NaN above Inf: one comparison of integers finds what is large and
// what is no number. No value is below a threshold that is NaN, as in torch.
inline std::int32_t least_bits(float threshold) { return threshold != threshold ? 0 : magnitude_bits(threshold); }

// Which of LANES values reach the threshold, one bit each.
inline std::uint64_t lanes_reaching(const float *at, std::int32_t least) {
#if defined(__AVX2__) && LANES == 8
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
    const __m256i bits = _mm256_and_si256(raw, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i reached = _mm256_cmpgt_epi32(bits, _mm256_set1_epi32(least - 1));
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(reached)));
#elif defined(__SSE2__) && LANES == 4
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at));
    const __m128i bits = _mm_and_si128(raw, _mm_set1_epi32(0x7FFFFFFF));
    const __m128i reached = _mm_cmpgt_epi32(bits, _mm_set1_epi32(least - 1));
    return static_cast<std::uint32_t>(_mm_movemask_ps(_mm_castsi128_ps(reached)));
#else
    std::uint64_t found = 0;
    for (int lane = 0; lane < LANES; ++lane)
        found |= static_cast<std::uint64_t>(magnitude_bits(at[lane]) >= least) << lane;
    return found;
#endif
}

// Which of up to 64 values reach the threshold.
inline std::uint64_t reaching(const float *at, std::ptrdiff_t count, std::int32_t least) {
    std::uint64_t found = 0;
    std::ptrdiff_t lane = 0;
    for (; lane + LANES <= count; lane += LANES) found |= lanes_reaching(at + lane, least) << lane;
    for (; lane < count; ++lane) found |= static_cast<std::uint64_t>(magnitude_bits(at[lane]) >= least) << lane;
    return found;
}

// Which values of block `block` reach the threshold, one bit each; returns how many.
inline std::ptrdiff_t find(const float *values, std::ptrdiff_t length, std::ptrdiff_t block, std::int32_t least,
                           bool by_offsets, std::uint64_t *words) {
    const std::ptrdiff_t start = block * kSparseBlock;
    std::ptrdiff_t total = 0;
    for (int word = 0; word < kWords; ++word) {
        const std::ptrdiff_t at = start + 64 * word, rest = length - at;
        words[word] = rest > 0 ? reaching(values + at, rest < 64 ? rest : 64, least) : 0;
        total += __builtin_popcountll(words[word]);
    }
    if (by_offsets && total == kSparseBlock) {  // a count of one byte can say 255
        words[kWords - 1] &= ~(std::uint64_t{1} << 63);
        --total;
    }
    return total;
}

// Clears all bits but the first `count`.
inline void keep_first(std::uint64_t *words, std::ptrdiff_t count) {
    for (int word = 0; word < kWords; ++word) {
        std::uint64_t kept = 0;
        for (; words[word] && count > 0; --count) {
            kept |= words[word] & (~words[word] + 1);
            words[word] &= words[word] - 1;
        }
        words[word] = kept;
    }
}

// Bytes of a bitmap that block `block` takes.
inline std::ptrdiff_t bitmap_bytes(std::ptrdiff_t length, std::ptrdiff_t block) {
    const std::ptrdiff_t rest = length - block * kSparseBlock;
    return ((rest < kSparseBlock ? rest : kSparseBlock) + 7) / 8;
}

inline void put_bitmap(std::uint8_t *out, const std::uint64_t *words, std::ptrdiff_t bytes) {
    for (std::ptrdiff_t byte = 0; byte < bytes; ++byte)
        out[byte] = static_cast<std::uint8_t>(words[byte / 8] >> (byte % 8 * 8));
}

inline void read_bitmap(const std::uint8_t *from, std::uint64_t *words, std::ptrdiff_t bytes) {
    for (int word = 0; word < kWords; ++word) words[word] = 0;
    for (std::ptrdiff_t byte = 0; byte < bytes; ++byte)
        words[byte / 8] |= static_cast<std::uint64_t>(from[byte]) << (byte % 8 * 8);
}

std::ptrdiff_t count(const float *values, std::ptrdiff_t length, float threshold, bool by_offsets,
                     std::ptrdiff_t begin, std::ptrdiff_t end) {
    std::uint64_t words[kWords];
    const std::int32_t least = least_bits(threshold);
    std::ptrdiff_t total = 0;
    for (std::ptrdiff_t block = begin; block < end; ++block)
        total += find(values, length, block, least, by_offsets, words);
    return total;
}

bool any_bad(const float *values, std::ptrdiff_t length, std::ptrdiff_t block) {
    std::uint64_t words[kWords];
    return find(values, length, block, kInfinity, false, words) > 0;
}

bool select(const float *values, float threshold, const SparsePlaces &places, std::ptrdiff_t start,
            std::ptrdiff_t begin, std::ptrdiff_t end, float *chosen) {
    const std::ptrdiff_t length = places.length, capacity = places.capacity;
    const bool by_offsets = places.bitmap == nullptr;
    const std::int32_t least = least_bits(threshold);
    std::uint64_t words[kWords];
    bool bad = false;
    for (std::ptrdiff_t block = begin; block < end; ++block) {
        std::ptrdiff_t found = find(values, length, block, least, by_offsets, words);
        if (found >= kSparseBlock - 1 || found > capacity - start) bad |= any_bad(values, length, block);
        if (found > capacity - start) {
            found = capacity > start ? capacity - start : 0;
            keep_first(words, found);
        }
        if (by_offsets)
            places.counts[block] = static_cast<std::uint8_t>(found);
        else
            put_bitmap(places.bitmap + block * (kSparseBlock / 8), words, bitmap_bytes(length, block));
        for (int word = 0; word < kWords; ++word)
            for (std::uint64_t left = words[word]; left; left &= left - 1) {
                const int offset = 64 * word + __builtin_ctzll(left);
                const float value = values[block * kSparseBlock + offset];
                bad |= magnitude_bits(value) >= kInfinity;
                if (by_offsets) places.offsets[start] = static_cast<std::uint8_t>(offset);
                chosen[start++] = value;
            }
    }
    return bad;
}

// Adds what one rank has in block `block` to sum [256]; returns how many places that took.
inline std::ptrdiff_t add_block(const SparsePlaces &places, std::ptrdiff_t block, std::ptrdiff_t width,
                                const float *values, std::ptrdiff_t used, float *sum) {
    const std::ptrdiff_t left = places.capacity - used;
    if (places.bitmap == nullptr) {
        const std::ptrdiff_t wanted = places.counts[block], taken = wanted < left ? wanted : left;
        for (std::ptrdiff_t at = used; at < used + taken; ++at) {
            const std::ptrdiff_t offset = places.offsets[at];
            if (offset < width) sum[offset] += values[at];  // what lies outside was never encoded
        }
        return taken;
    }
    std::uint64_t words[kWords];
    read_bitmap(places.bitmap + block * (kSparseBlock / 8), words, bitmap_bytes(places.length, block));
    std::ptrdiff_t taken = 0;
    for (int word = 0; word < kWords; ++word)
        for (std::uint64_t bits = words[word]; bits && taken < left; bits &= bits - 1, ++taken) {
            const std::ptrdiff_t offset = 64 * word + __builtin_ctzll(bits);
            if (offset < width) sum[offset] += values[used + taken];
        }
    return taken;
}

void decode(const SparseRows &rows, std::ptrdiff_t *used, std::ptrdiff_t begin, std::ptrdiff_t end) {
    const std::ptrdiff_t length = rows.first.length;
    const float divisor = static_cast<float>(rows.ranks);
    for (std::ptrdiff_t block = begin; block < end; ++block) {
        const std::ptrdiff_t start = block * kSparseBlock, rest = length - start;
        const std::ptrdiff_t width = rest < kSparseBlock ? rest : kSparseBlock;
        float sum[kSparseBlock] = {};
        for (std::ptrdiff_t rank = 0; rank < rows.ranks; ++rank) {
            const std::ptrdiff_t shift = rank * rows.distance;
            SparsePlaces places = rows.first;
            if (places.bitmap != nullptr)
                places.bitmap += shift;
            else
                places.counts += shift, places.offsets += shift;
            used[rank] += add_block(places, block, width, rows.values + rank * places.capacity, used[rank], sum);
        }
        if (rows.ranks > 1)
            for (float &value : sum) value /= divisor;
        if (rows.total != nullptr)
            for (std::ptrdiff_t at = 0; at < width; ++at) rows.out[start + at] = rows.total[start + at] - sum[at];
        else
            std::memcpy(rows.out + start, sum, width * sizeof(float));
    }
}

}  // namespace

namespace sparse_codec {
extern const SparseKernels KERNELS{count, select, decode};
}
