// The three ways of cutting a value (float_codec.hpp): each tells, from what is known of a value, its context, and turns
// the value into a symbol with low bits and back.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bits.hpp"
#include "float_codec.hpp"
#include "float_formats.hpp"

namespace checkpoint {

constexpr std::uint8_t kZero = 253;       // +0
constexpr std::uint8_t kPredicted = 254;  // the prediction itself
constexpr std::uint8_t kEscape = 255;     // the value's bits follow
constexpr std::int64_t kLargest = 126;    // distance from the prediction, in steps

struct Piece {
    std::uint64_t low;
    unsigned low_bits;
    std::uint8_t symbol;
};

inline std::uint32_t bits_at(const float *values, std::size_t i, float otherwise) {
    return values != nullptr ? word_at<std::uint32_t>(values, i) : word_at<std::uint32_t>(&otherwise, 0);
}

template <typename F>
inline Piece whole(std::uint32_t bits) {
    return {bits, F::kBits, kEscape};
}

template <typename F>
inline std::uint32_t from_key(std::int64_t key) {
    if (key < 0 || key >= (std::int64_t{1} << F::kBits)) throw std::invalid_argument("a value lies outside its format");
    return bits_of_key<F>(static_cast<std::uint32_t>(key));
}

// Units in the last place from the prediction's key, 2^shift of them a step.
template <typename F>
inline Piece cut_distance(std::uint32_t bits, std::uint32_t key, unsigned shift) {
    const std::int64_t distance = static_cast<std::int64_t>(key_of<F>(bits)) - static_cast<std::int64_t>(key);
    const std::int64_t step = distance >> shift;
    if (step < -kLargest || step > kLargest) return whole<F>(bits);
    return {static_cast<std::uint64_t>(distance) & ((std::uint64_t{1} << shift) - 1), shift,
            static_cast<std::uint8_t>(step + kLargest)};
}

template <typename F>
inline std::uint32_t join_distance(std::uint8_t symbol, std::uint64_t low, std::uint32_t key, unsigned shift) {
    const std::int64_t step = static_cast<std::int64_t>(symbol) - kLargest;
    return from_key<F>(static_cast<std::int64_t>(key) + step * (std::int64_t{1} << shift) +
                       static_cast<std::int64_t>(low));
}

template <typename F>
class RelativeCut {
  public:
    static constexpr unsigned kContexts = 1;

    RelativeCut(const Knowledge &known) : known_(known) {}

    struct Outlook {
        std::uint32_t bits;
        unsigned context = 0;
    };

    Outlook look(std::size_t i) const {
        const std::uint32_t bits = finite_or(bits_at(known_.predictions, i, 0.0f), 0);
        return {F::round(bits & 0x7FFFFFFFu) | (bits >> 31) << (F::kBits - 1)};
    }

    Piece cut(std::uint32_t bits, const Outlook &at) const {
        if (bits == at.bits) return {0, 0, kPredicted};
        if (bits == 0) return {0, 0, kZero};
        return cut_distance<F>(bits, key_of<F>(at.bits), known_.resolution);
    }

    std::uint32_t join(std::uint8_t symbol, const Outlook &at, BitReader &in, bool safe) const {
        if (symbol == kPredicted) return at.bits;
        if (symbol == kZero) return 0;
        if (symbol == kEscape) return static_cast<std::uint32_t>(in.take_if(F::kBits, safe));
        return join_distance<F>(symbol, in.take_if(known_.resolution, safe), key_of<F>(at.bits), known_.resolution);
    }

  private:
    const Knowledge known_;
};

template <typename F>
class LogarithmicCut {
  public:
    static constexpr unsigned kContexts = 1;

    LogarithmicCut(const Knowledge &known) : known_(known) {}

    struct Outlook {
        std::int64_t lowest;  // pattern of the lowest magnitude that has a symbol
        unsigned context = 0;
    };

    Outlook look(std::size_t i) const {
        const std::uint32_t scale = finite_or(bits_at(known_.scales, i, known_.scale) & 0x7FFFFFFFu, 0x3F800000u);
        return {static_cast<std::int64_t>(F::round(scale)) - (kOctavesBelow << F::kMantissa)};
    }

    Piece cut(std::uint32_t bits, const Outlook &at) const {
        if (bits == 0) return {0, 0, kZero};
        const std::int64_t height = static_cast<std::int64_t>(bits & ~kSign<F>) - at.lowest;
        const std::int64_t eighth = height >> kLowBits;
        if (eighth < 0 || eighth >= kEighths) return whole<F>(bits);
        const std::uint64_t sign = bits >> (F::kBits - 1);
        const std::uint64_t low = static_cast<std::uint64_t>(height) & ((1u << kLowBits) - 1);
        // The sign is a coin's throw: no symbol need tell it.
        return {low << 1 | sign, kLowBits + 1, static_cast<std::uint8_t>(eighth)};
    }

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
    static constexpr std::int64_t kEighths = 248, kOctavesBelow = 24;
    const Knowledge known_;
};

template <typename F>
class LinearCut {
  public:
    // In cells: by half octaves of the scale. In units: by how many octaves a cell is narrower, halves, fractions.
    static constexpr unsigned kNarrow = 14, kContexts = 2 + 2 * kNarrow * F::kFractions;

    LinearCut(const Knowledge &known) : known_(known) {}

    struct Outlook {
        std::uint32_t bits;     // of the prediction
        std::int32_t exponent;  // of a cell, biased
        std::int32_t widths;    // binary logarithm of cell / unit in the last place of the prediction
        unsigned context;
    };

    Outlook look(std::size_t i) const {
        const std::uint32_t value = finite_or(bits_at(known_.predictions, i, 0.0f), 0);
        const std::uint32_t scale = finite_or(bits_at(known_.scales, i, known_.scale) & 0x7FFFFFFFu, 0x3F800000u);
        Outlook at;
        at.bits = F::round(value & 0x7FFFFFFFu) | (value >> 31) << (F::kBits - 1);
        at.exponent = static_cast<std::int32_t>(scale >> 23) - static_cast<std::int32_t>(known_.resolution);
        const auto own = static_cast<std::int32_t>((at.bits & ~kSign<F>) >> F::kMantissa);
        at.widths = at.exponent - std::max(own, 1) + static_cast<std::int32_t>(F::kMantissa);
        const unsigned half = scale >> 22 & 1u;
        const unsigned narrow = static_cast<unsigned>(std::clamp(1 - at.widths, 0, static_cast<int>(kNarrow) - 1));
        const unsigned fine = 2 + (2 * narrow + half) * F::kFractions + F::fraction(value & 0x7FFFFFFFu);
        at.context = in_cells(at) ? half : fine;
        return at;
    }

    Piece cut(std::uint32_t bits, const Outlook &at) const {
        if (bits == at.bits) return {0, 0, kPredicted};
        if (bits == 0) return {0, 0, kZero};
        if (!in_cells(at)) return cut_distance<F>(bits, key_of<F>(at.bits), fine_shift(at));
        const std::uint32_t magnitude = bits & ~kSign<F>;
        const std::int32_t above = static_cast<std::int32_t>(magnitude >> F::kMantissa) - at.exponent;
        if (above > static_cast<std::int32_t>(F::kMantissa)) return whole<F>(bits);
        const std::int64_t step = cell_of(bits, at.exponent) - cell_of(at.bits, at.exponent);
        if (step < -kLargest || step > kLargest) return whole<F>(bits);
        const auto symbol = static_cast<std::uint8_t>(step + kLargest);
        if (above >= 0) {
            const unsigned low_bits = F::kMantissa - static_cast<unsigned>(above);
            return {magnitude & ((1u << low_bits) - 1), low_bits, symbol};
        }
        // In a cell at zero: every octave further down is half as likely, so one bit an octave is the right code.
        const unsigned down = static_cast<unsigned>(-above) - 1;
        if (down >= kMostOctaves) return {kOnes | std::uint64_t{magnitude} << kMostOctaves, kMostOctaves + F::kBits - 1, symbol};
        const std::uint64_t mantissa = magnitude & ((1u << F::kMantissa) - 1);
        return {((std::uint64_t{1} << down) - 1) | mantissa << (down + 1), down + 1 + F::kMantissa, symbol};
    }

    std::uint32_t join(std::uint8_t symbol, const Outlook &at, BitReader &in, bool safe) const {
        if (symbol == kPredicted) return at.bits;
        if (symbol == kZero) return 0;
        if (symbol == kEscape) return static_cast<std::uint32_t>(in.take_if(F::kBits, safe));
        if (!in_cells(at))
            return join_distance<F>(symbol, in.take_if(fine_shift(at), safe), key_of<F>(at.bits), fine_shift(at));
        const std::int64_t cell =
            cell_of(at.bits, at.exponent) + static_cast<std::int64_t>(symbol) - kLargest;
        const std::uint32_t sign = cell < 0 ? kSign<F> : 0;
        const std::uint64_t index = static_cast<std::uint64_t>(cell < 0 ? -1 - cell : cell);
        if (index == 0) return sign | near_zero(at, in, safe);
        const unsigned above = 63 - static_cast<unsigned>(__builtin_clzll(index));
        if (above > F::kMantissa) throw std::invalid_argument("a cell lies too far out");
        const unsigned low_bits = F::kMantissa - above;
        const std::uint64_t mantissa = index << low_bits | in.take_if(low_bits, safe);
        const std::int64_t exponent = at.exponent + static_cast<std::int64_t>(above);
        if (exponent < 1 || exponent > 255) throw std::invalid_argument("an exponent lies outside its format");
        return sign | static_cast<std::uint32_t>(exponent) << F::kMantissa |
               static_cast<std::uint32_t>(mantissa & ((1u << F::kMantissa) - 1));
    }

  private:
    static constexpr unsigned kMostOctaves = 24;
    static constexpr std::uint64_t kOnes = (std::uint64_t{1} << kMostOctaves) - 1;

    // A cell must be wider than a unit in the last place, and of normal numbers' exponent.
    static bool in_cells(const Outlook &at) { return at.widths >= 2 && at.exponent >= 1; }
    static unsigned fine_shift(const Outlook &at) { return static_cast<unsigned>(std::clamp(at.widths, 0, 1)); }

    static std::int64_t cell_of(std::uint32_t bits, std::int32_t exponent) {
        const std::uint32_t magnitude = bits & ~kSign<F>;
        const std::int32_t above = static_cast<std::int32_t>(magnitude >> F::kMantissa) - exponent;
        const std::uint32_t mantissa = (magnitude & ((1u << F::kMantissa) - 1)) | 1u << F::kMantissa;
        const std::int64_t index = above < 0 ? 0 : mantissa >> (F::kMantissa - static_cast<unsigned>(above));
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

    const Knowledge known_;
};

}  // namespace checkpoint
