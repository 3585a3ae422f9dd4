// The three ways of cutting a value (float_codec.hpp): each tells, from what is known of a value, its context, and turns
// the value into a symbol with low bits and back. Looking and cutting are without branches, so that loops over them
// become vectors.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bits.hpp"
#include "float_codec.hpp"
#include "float_formats.hpp"

namespace checkpoint {

constexpr std::uint32_t kZero = 253;       // +0
constexpr std::uint32_t kPredicted = 254;  // the prediction itself
constexpr std::uint32_t kEscape = 255;     // the value's bits follow
constexpr std::int32_t kLargest = 126;     // distance from the prediction, in steps
constexpr std::uint32_t kAlone = 64;       // for `low_bits`: more than 32 of them, which `low_of` tells

struct Piece {
    std::uint32_t low, low_bits, symbol;
};

// `a` where `condition` is true: both are computed.
inline Piece either(bool condition, const Piece &a, const Piece &b) {
    return {condition ? a.low : b.low, condition ? a.low_bits : b.low_bits, condition ? a.symbol : b.symbol};
}

template <typename F>
inline Piece whole(std::uint32_t bits) {
    return {bits, F::kBits, kEscape};
}

// The patterns that need no distance, and all that lies too far for one.
template <typename F>
inline Piece with_special(Piece piece, bool near, std::uint32_t bits, std::uint32_t predicted) {
    piece = either(near, piece, whole<F>(bits));
    piece = either(bits == 0, {0, 0, kZero}, piece);
    return either(bits == predicted, {0, 0, kPredicted}, piece);
}

template <typename F>
inline std::uint32_t from_key(std::int64_t key) {
    if (key < 0 || key >= (std::int64_t{1} << F::kBits)) throw std::invalid_argument("a value lies outside its format");
    return bits_of_key<F>(static_cast<std::uint32_t>(key));
}

// Units in the last place from the prediction's key, 2^shift of them a step. Predictions are finite, so that no distance
// of 32 bits is another one too.
template <typename F>
inline Piece cut_distance(std::uint32_t bits, std::uint32_t predicted, unsigned shift) {
    const std::uint32_t above = key_of<F>(bits) - key_of<F>(predicted) + (static_cast<std::uint32_t>(kLargest) << shift);
    const std::uint32_t symbol = above >> shift;
    return either(symbol <= 2 * kLargest, {above & ((1u << shift) - 1), shift, symbol}, whole<F>(bits));
}

template <typename F>
inline std::uint32_t join_distance(std::uint8_t symbol, std::uint64_t low, std::uint32_t predicted, unsigned shift) {
    const std::int64_t step = static_cast<std::int64_t>(symbol) - kLargest;
    return from_key<F>(static_cast<std::int64_t>(key_of<F>(predicted)) + step * (std::int64_t{1} << shift) +
                       static_cast<std::int64_t>(low));
}

// An fp32 pattern in the format F.
template <typename F>
inline std::uint32_t rounded(std::uint32_t bits) {
    return F::round(bits & 0x7FFFFFFFu) | (bits >> 31) << (F::kBits - 1);
}

template <typename F>
class RelativeCut {
  public:
    static constexpr unsigned kContexts = 1;

    RelativeCut(unsigned resolution) : resolution_(resolution) {}

    struct Outlook {
        std::uint32_t bits;
        std::uint32_t context;
    };

    // `prediction`, `scale`: fp32 patterns.
    Outlook look(std::uint32_t prediction, std::uint32_t) const {
        return {rounded<F>(finite_or(prediction, 0)), 0};
    }

    Piece cut(std::uint32_t bits, const Outlook &at) const {
        return with_special<F>(cut_distance<F>(bits, at.bits, resolution_), true, bits, at.bits);
    }

    static std::uint64_t low_of(std::uint32_t, const Outlook &, unsigned &) { return 0; }  // none has that many

    std::uint32_t join(std::uint8_t symbol, const Outlook &at, BitReader &in, bool safe) const {
        if (symbol == kPredicted) return at.bits;
        if (symbol == kZero) return 0;
        if (symbol == kEscape) return static_cast<std::uint32_t>(in.take_if(F::kBits, safe));
        return join_distance<F>(symbol, in.take_if(resolution_, safe), at.bits, resolution_);
    }

  private:
    const unsigned resolution_;
};

template <typename F>
class LogarithmicCut {
  public:
    static constexpr unsigned kContexts = 1;

    LogarithmicCut(unsigned) {}

    struct Outlook {
        std::int32_t lowest;  // pattern of the lowest magnitude that has a symbol
        std::uint32_t context;
    };

    Outlook look(std::uint32_t, std::uint32_t scale) const {
        const std::uint32_t pattern = F::round(finite_or(scale & 0x7FFFFFFFu, 0x3F800000u));
        return {static_cast<std::int32_t>(pattern) - (kOctavesBelow << F::kMantissa), 0};
    }

    Piece cut(std::uint32_t bits, const Outlook &at) const {
        const std::uint32_t height = (bits & ~kSign<F>) - static_cast<std::uint32_t>(at.lowest);
        // The sign is a coin's throw: no symbol need tell it.
        const std::uint32_t low = (height & ((1u << kLowBits) - 1)) << 1 | bits >> (F::kBits - 1);
        const Piece piece = either(height < kEighths << kLowBits, {low, kLowBits + 1, height >> kLowBits}, whole<F>(bits));
        return either(bits == 0, {0, 0, kZero}, piece);
    }

    static std::uint64_t low_of(std::uint32_t, const Outlook &, unsigned &) { return 0; }  // none has that many

    std::uint32_t join(std::uint8_t symbol, const Outlook &at, BitReader &in, bool safe) const {
        if (symbol == kZero) return 0;
        if (symbol == kEscape) return static_cast<std::uint32_t>(in.take_if(F::kBits, safe));
        const std::uint64_t low = in.take_if(kLowBits + 1, safe);
        const std::int64_t magnitude =
            at.lowest + (static_cast<std::int64_t>(symbol) << kLowBits) + static_cast<std::int64_t>(low >> 1);
        if (magnitude < 0 || magnitude >= static_cast<std::int64_t>(kSign<F>))
            throw std::invalid_argument("a magnitude lies outside its format");
        return static_cast<std::uint32_t>(magnitude) | static_cast<std::uint32_t>(low & 1) << (F::kBits - 1);
    }

  private:
    static constexpr unsigned kLowBits = F::kMantissa - 3;
    static constexpr std::uint32_t kEighths = 248;
    static constexpr std::int32_t kOctavesBelow = 24;
};

template <typename F>
class LinearCut {
  public:
    // In cells: by half octaves of the scale. In units: by how many octaves a cell is narrower, halves, fractions.
    static constexpr unsigned kNarrow = 14, kContexts = 2 + 2 * kNarrow * F::kFractions;

    LinearCut(unsigned resolution) : resolution_(static_cast<std::int32_t>(resolution)) {}

    struct Outlook {
        std::uint32_t bits;     // of the prediction
        std::int32_t exponent;  // of a cell, biased
        std::int32_t widths;    // binary logarithm of cell / unit in the last place of the prediction
        std::uint32_t context;
    };

    Outlook look(std::uint32_t prediction, std::uint32_t scale_bits) const {
        const std::uint32_t value = finite_or(prediction, 0);
        const std::uint32_t scale = finite_or(scale_bits & 0x7FFFFFFFu, 0x3F800000u);
        Outlook at;
        at.bits = rounded<F>(value);
        at.exponent = static_cast<std::int32_t>(scale >> 23) - resolution_;
        const auto own = static_cast<std::int32_t>((at.bits & ~kSign<F>) >> F::kMantissa);
        at.widths = at.exponent - std::max(own, 1) + kMantissa;
        const std::uint32_t half = scale >> 22 & 1u;
        const auto narrow = static_cast<std::uint32_t>(std::min(std::max(1 - at.widths, 0), static_cast<int>(kNarrow) - 1));
        const std::uint32_t fine = 2 + (2 * narrow + half) * F::kFractions + F::fraction(value & 0x7FFFFFFFu);
        at.context = in_cells(at) ? half : fine;
        return at;
    }

    Piece cut(std::uint32_t bits, const Outlook &at) const {
        const std::uint32_t magnitude = bits & ~kSign<F>;
        const std::int32_t above = static_cast<std::int32_t>(magnitude >> F::kMantissa) - at.exponent;
        const std::int32_t step = cell_of(bits, at.exponent) - cell_of(at.bits, at.exponent);
        const std::uint32_t low_bits = static_cast<std::uint32_t>(std::min(std::max(kMantissa - above, 0), kMantissa));
        // In a cell at zero: every octave further down is half as likely, so one bit an octave is the right code.
        const std::int32_t down = std::min(std::max(-above - 1, 0), kFewOctaves);
        const std::uint32_t near_zero = ((1u << down) - 1) | (magnitude & kFraction) << down << 1;
        const std::uint32_t near_bits = -above - 1 > down ? kAlone : static_cast<std::uint32_t>(down + 1 + kMantissa);
        const auto symbol = static_cast<std::uint32_t>(step + kLargest);
        const Piece cells = either(above < 0, {near_zero, near_bits, symbol},
                                   {magnitude & ((1u << low_bits) - 1), low_bits, symbol});
        const bool near = (above <= kMantissa) & (symbol <= 2 * kLargest);
        const bool far_cells = in_cells(at) & !near;
        return with_special<F>(either(in_cells(at), cells, cut_distance<F>(bits, at.bits, fine_shift(at))), !far_cells,
                               bits, at.bits);
    }

    // The low bits of a value whose cell is at zero, and how many they are, where they are more than 32.
    static std::uint64_t low_of(std::uint32_t bits, const Outlook &at, unsigned &count) {
        const std::uint64_t magnitude = bits & ~kSign<F>;
        const auto down = static_cast<unsigned>(at.exponent - static_cast<std::int32_t>(magnitude >> F::kMantissa) - 1);
        if (down >= kMostOctaves) {
            count = kMostOctaves + F::kBits - 1;
            return kOnes | magnitude << kMostOctaves;
        }
        count = down + 1 + F::kMantissa;
        return ((std::uint64_t{1} << down) - 1) | (magnitude & kFraction) << (down + 1);
    }

    std::uint32_t join(std::uint8_t symbol, const Outlook &at, BitReader &in, bool safe) const {
        if (symbol == kPredicted) return at.bits;
        if (symbol == kZero) return 0;
        if (symbol == kEscape) return static_cast<std::uint32_t>(in.take_if(F::kBits, safe));
        if (!in_cells(at))
            return join_distance<F>(symbol, in.take_if(fine_shift(at), safe), at.bits, fine_shift(at));
        const std::int32_t cell = cell_of(at.bits, at.exponent) + static_cast<std::int32_t>(symbol) - kLargest;
        const std::uint32_t sign = cell < 0 ? kSign<F> : 0;
        const auto index = static_cast<std::uint32_t>(cell < 0 ? -1 - cell : cell);
        if (index == 0) return sign | near_zero(at, in, safe);
        const unsigned above = 31 - static_cast<unsigned>(__builtin_clz(index));
        if (above > F::kMantissa) throw std::invalid_argument("a cell lies too far out");
        const unsigned low_bits = F::kMantissa - above;
        const std::uint64_t mantissa = std::uint64_t{index} << low_bits | in.take_if(low_bits, safe);
        const std::int64_t exponent = at.exponent + static_cast<std::int64_t>(above);
        if (exponent < 1 || exponent > 255) throw std::invalid_argument("an exponent lies outside its format");
        return sign | static_cast<std::uint32_t>(exponent) << F::kMantissa |
               static_cast<std::uint32_t>(mantissa & ((1u << F::kMantissa) - 1));
    }

  private:
    static constexpr unsigned kMostOctaves = 24;
    static constexpr std::int32_t kMantissa = static_cast<std::int32_t>(F::kMantissa);
    static constexpr std::int32_t kFewOctaves = std::min(31 - kMantissa, static_cast<std::int32_t>(kMostOctaves) - 1);
    static constexpr std::uint32_t kFraction = (1u << F::kMantissa) - 1;
    static constexpr std::uint64_t kOnes = (std::uint64_t{1} << kMostOctaves) - 1;

    // A cell must be wider than a unit in the last place, and of normal numbers' exponent.
    static bool in_cells(const Outlook &at) { return (at.widths >= 2) & (at.exponent >= 1); }
    static unsigned fine_shift(const Outlook &at) { return at.widths > 0 ? 1u : 0u; }

    // Exact where the exponent of `bits` is not above that of a cell by more than kMantissa.
    static std::int32_t cell_of(std::uint32_t bits, std::int32_t exponent) {
        const std::uint32_t magnitude = bits & ~kSign<F>;
        const std::int32_t above = static_cast<std::int32_t>(magnitude >> F::kMantissa) - exponent;
        const std::int32_t shift = std::min(std::max(kMantissa - above, 0), 31);  // beyond kMantissa nothing is left
        const auto index = static_cast<std::int32_t>(((magnitude & kFraction) | 1u << F::kMantissa) >> shift);
        return bits & kSign<F> ? -1 - index : index;
    }

    static std::uint32_t near_zero(const Outlook &at, BitReader &in, bool safe) {
        unsigned down = 0;
        while (down < kMostOctaves && in.take_if(1, safe) == 1) ++down;
        if (down == kMostOctaves) return static_cast<std::uint32_t>(in.take_if(F::kBits - 1, safe));
        const std::int32_t exponent = at.exponent - 1 - static_cast<std::int32_t>(down);
        if (exponent < 0) throw std::invalid_argument("an exponent lies below its format");
        return static_cast<std::uint32_t>(exponent) << F::kMantissa |
               static_cast<std::uint32_t>(in.take_if(F::kMantissa, safe));
    }

    const std::int32_t resolution_;
};

}  // namespace checkpoint
