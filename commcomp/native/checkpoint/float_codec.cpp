#include "float_codec.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "float_cuts.hpp"
#include "float_kernels.hpp"
#include "rans.hpp"

namespace checkpoint {

namespace {

constexpr std::size_t kMostLowBits = 56;

// Block by block what is known, as patterns; constants where nothing is.
class Blocks {
  public:
    Blocks(const Knowledge &known) : known_(known) {
        std::uint32_t scale;
        std::memcpy(&scale, &known.scale, 4);
        no_predictions_.fill(0);
        one_scale_.fill(scale);
    }

    BlockKnowledge from(std::size_t begin) const {
        return {known_.predictions == nullptr ? no_predictions_.data() : patterns(known_.predictions + begin),
                known_.scales == nullptr ? one_scale_.data() : patterns(known_.scales + begin), known_.resolution};
    }

  private:
    static const std::uint32_t *patterns(const float *values) { return reinterpret_cast<const std::uint32_t *>(values); }

    const Knowledge &known_;
    std::array<std::uint32_t, kBlock> no_predictions_, one_scale_;
};

template <typename F, template <typename> class CutOf>
std::vector<std::uint8_t> encode(const typename F::Word *values, std::size_t count, const Knowledge &known) {
    const FloatKernels &kernels = float_kernels(F::kFormat, known.cut);
    const CutOf<F> way(known.resolution);
    const Blocks blocks(known);
    const std::unique_ptr<std::uint8_t[]> symbols(new std::uint8_t[count + 1]), contexts(new std::uint8_t[count + 1]);
    LowBits low;
    BitWriter bits(4, count * sizeof(typename F::Word));
    for (std::size_t begin = 0; begin < count; begin += kBlock) {
        const std::size_t size = std::min(kBlock, count - begin);
        const BlockKnowledge block = blocks.from(begin);
        kernels.cut(values + begin, block, size, symbols.get() + begin, contexts.get() + begin, low);
        bits.reserve(size * kMostLowBits);
        const auto put = [&](std::size_t i) {
            unsigned width = low.count[i];
            if (width < kAlone) return bits.put(low.low[i], width);
            const std::uint64_t wide = way.low_of(values[begin + i], way.look(block.predictions[i], block.scales[i]), width);
            bits.put(wide, width);
        };
        std::size_t i = 0;
        for (; i + 2 <= size; i += 2) {
            const unsigned first = low.count[i], both = first + low.count[i + 1];
            if (both <= kMostLowBits) {
                bits.put(low.low[i] | std::uint64_t{low.low[i + 1]} << first, both);
            } else {
                put(i);
                put(i + 1);
            }
        }
        if (i < size) put(i);
    }
    std::vector<std::uint8_t> out = bits.finish();
    const auto low_bytes = static_cast<std::uint32_t>(out.size() - 4);
    std::memcpy(out.data(), &low_bytes, 4);
    append_symbols(symbols.get(), CutOf<F>::kContexts > 1 ? contexts.get() : nullptr, count, CutOf<F>::kContexts, out);
    return out;
}

template <typename F, template <typename> class CutOf>
void decode(const std::uint8_t *data, std::size_t size, std::size_t count, const Knowledge &known,
            typename F::Word *values) {
    const CutOf<F> way(known.resolution);
    const Blocks blocks(known);
    std::uint32_t low_bytes = 0;
    if (size < 4) throw std::invalid_argument("a chunk of values is shorter than its head");
    std::memcpy(&low_bytes, data, 4);
    if (low_bytes > size - 4) throw std::invalid_argument("a chunk of values ends in its low bits");
    const std::unique_ptr<std::uint8_t[]> symbols(new std::uint8_t[count + 1]);
    std::unique_ptr<std::uint8_t[]> contexts;
    if (CutOf<F>::kContexts > 1) {
        contexts.reset(new std::uint8_t[count + 1]);
        const FloatKernels &kernels = float_kernels(F::kFormat, known.cut);
        for (std::size_t begin = 0; begin < count; begin += kBlock)
            kernels.contexts(blocks.from(begin), std::min(kBlock, count - begin), contexts.get() + begin);
    }
    decode_symbols(data + 4 + low_bytes, size - 4 - low_bytes, contexts.get(), count, CutOf<F>::kContexts, symbols.get());
    BitReader bits(data + 4, low_bytes);
    for (std::size_t begin = 0; begin < count; begin += kBlock) {
        const std::size_t end = std::min(begin + kBlock, count);
        const bool safe = bits.far_from_end((end - begin) * kMostLowBits);
        const BlockKnowledge block = blocks.from(begin);
        for (std::size_t i = begin; i < end; ++i) {
            const auto at = way.look(block.predictions[i - begin], block.scales[i - begin]);
            values[i] = static_cast<typename F::Word>(way.join(symbols[i], at, bits, safe));
        }
    }
    if (!bits.at_end()) throw std::invalid_argument("low bits are left over");
}

template <template <typename> class CutOf>
std::vector<std::uint8_t> encode_with(Format format, const void *values, std::size_t count, const Knowledge &known) {
    return format == Format::fp32 ? encode<Fp32, CutOf>(static_cast<const std::uint32_t *>(values), count, known)
                                  : encode<Bf16, CutOf>(static_cast<const std::uint16_t *>(values), count, known);
}

template <template <typename> class CutOf>
void decode_with(Format format, const std::uint8_t *data, std::size_t size, std::size_t count, const Knowledge &known,
                 void *values) {
    if (format == Format::fp32)
        decode<Fp32, CutOf>(data, size, count, known, static_cast<std::uint32_t *>(values));
    else
        decode<Bf16, CutOf>(data, size, count, known, static_cast<std::uint16_t *>(values));
}

}  // namespace

std::vector<std::uint8_t> encode_floats(Format format, const void *values, std::size_t count, const Knowledge &known) {
    switch (known.cut) {
        case Cut::linear: return encode_with<LinearCut>(format, values, count, known);
        case Cut::logarithmic: return encode_with<LogarithmicCut>(format, values, count, known);
        default: return encode_with<RelativeCut>(format, values, count, known);
    }
}

void decode_floats(Format format, const std::uint8_t *data, std::size_t size, std::size_t count,
                   const Knowledge &known, void *values) {
    switch (known.cut) {
        case Cut::linear: return decode_with<LinearCut>(format, data, size, count, known, values);
        case Cut::logarithmic: return decode_with<LogarithmicCut>(format, data, size, count, known, values);
        default: return decode_with<RelativeCut>(format, data, size, count, known, values);
    }
}

}  // namespace checkpoint
