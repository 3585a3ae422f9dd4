#include "float_codec.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "float_cuts.hpp"
#include "instruction_sets.hpp"
#include "symbols.hpp"

namespace checkpoint {

namespace {

constexpr std::size_t kMostLowBits = 56;

// Block by block what is known, as patterns; constants where nothing is.
class Blocks {
  public:
    Blocks(const Knowledge &known) : known_(known) {
        std::uint32_t scale;
        std::memcpy(&scale, &known.scale, 4);
        one_scale_.fill(scale);
    }

    BlockKnowledge from(std::size_t begin) const {
        return {known_.predictions == nullptr ? no_predictions_.data() : place(known_.predictions, begin),
                known_.scales == nullptr ? one_scale_.data() : place(known_.scales, begin), known_.resolution};
    }

  private:
    static const void *place(const float *values, std::size_t begin) {
        return reinterpret_cast<const unsigned char *>(values) + begin * sizeof(float);
    }

    const Knowledge &known_;
    std::array<std::uint32_t, kBlock> no_predictions_{}, one_scale_;
};

template <typename Cut>
auto outlook(const Cut &way, const BlockKnowledge &known, std::size_t i) {
    return way.look(word_at<std::uint32_t>(known.predictions, i), word_at<std::uint32_t>(known.scales, i));
}

// Of one chunk at a time in each thread.
struct Scratch {
    Buffer symbols, contexts;
    LowBits low;
};

Scratch &scratch() {
    thread_local Scratch one;
    return one;
}

template <typename F, template <typename> class CutOf>
void encode(const void *values, std::size_t count, const Knowledge &known, std::size_t columns, Output &out) {
    using Word = typename F::Word;
    const FloatKernels &kernels = float_kernels(F::kFormat, known.cut);
    const CutOf<F> way(known.resolution);
    const Blocks blocks(known);
    LowBits &low = scratch().low;
    std::uint8_t *const symbols = scratch().symbols.room(0, count), *const contexts = scratch().contexts.room(0, count);
    const std::size_t head = out.size();
    out.grow(4);
    BitWriter bits(out);
    for (std::size_t begin = 0; begin < count; begin += kBlock) {
        const std::size_t size = std::min(kBlock, count - begin);
        const BlockKnowledge block = blocks.from(begin);
        const unsigned char *const words = static_cast<const unsigned char *>(values) + begin * sizeof(Word);
        kernels.cut(words, block, size, symbols + begin, contexts + begin, low);
        bits.reserve(size * kMostLowBits);
        const auto put = [&](std::size_t i) {
            unsigned width = low.count[i];
            if (width < kAlone) return bits.put(low.low[i], width);
            const std::uint64_t wide = way.low_of(word_at<Word>(values, begin + i), outlook(way, block, i), width);
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
    bits.finish();
    const auto low_bytes = static_cast<std::uint32_t>(out.size() - head - 4);
    std::memcpy(out.data() + head, &low_bytes, 4);
    encode_symbols(symbols, CutOf<F>::kContexts > 1 ? contexts : nullptr, count, CutOf<F>::kContexts, columns, out);
}

template <typename F, template <typename> class CutOf>
void decode(const std::uint8_t *data, std::size_t size, std::size_t count, const Knowledge &known, void *values) {
    const CutOf<F> way(known.resolution);
    const Blocks blocks(known);
    std::uint32_t low_bytes = 0;
    if (size < 4) throw std::invalid_argument("a chunk of values is shorter than its head");
    std::memcpy(&low_bytes, data, 4);
    if (low_bytes > size - 4) throw std::invalid_argument("a chunk of values ends in its low bits");
    std::uint8_t *const symbols = scratch().symbols.room(0, count);
    std::uint8_t *const contexts = CutOf<F>::kContexts > 1 ? scratch().contexts.room(0, count) : nullptr;
    if (contexts != nullptr) {
        const FloatKernels &kernels = float_kernels(F::kFormat, known.cut);
        for (std::size_t begin = 0; begin < count; begin += kBlock)
            kernels.contexts(blocks.from(begin), std::min(kBlock, count - begin), contexts + begin);
    }
    decode_symbols(data + 4 + low_bytes, size - 4 - low_bytes, contexts, count, CutOf<F>::kContexts, symbols);
    BitReader bits(data + 4, low_bytes);
    for (std::size_t begin = 0; begin < count; begin += kBlock) {
        const std::size_t end = std::min(begin + kBlock, count);
        const bool safe = bits.far_from_end((end - begin) * kMostLowBits);
        const BlockKnowledge block = blocks.from(begin);
        for (std::size_t i = begin; i < end; ++i) {
            const auto at = outlook(way, block, i - begin);
            put_word_at(values, i, static_cast<typename F::Word>(way.join(symbols[i], at, bits, safe)));
        }
    }
    if (!bits.at_end()) throw std::invalid_argument("low bits are left over");
}

template <template <typename> class CutOf>
void encode_with(Format format, const void *values, std::size_t count, const Knowledge &known, std::size_t columns,
                 Output &out) {
    if (format == Format::fp32)
        encode<Fp32, CutOf>(values, count, known, columns, out);
    else
        encode<Bf16, CutOf>(values, count, known, columns, out);
}

template <template <typename> class CutOf>
void decode_with(Format format, const std::uint8_t *data, std::size_t size, std::size_t count, const Knowledge &known,
                 void *values) {
    if (format == Format::fp32)
        decode<Fp32, CutOf>(data, size, count, known, values);
    else
        decode<Bf16, CutOf>(data, size, count, known, values);
}

}  // namespace

void encode_floats(Format format, const void *values, std::size_t count, const Knowledge &known, std::size_t columns,
                   Output &out) {
    switch (known.cut) {
        case Cut::linear: return encode_with<LinearCut>(format, values, count, known, columns, out);
        case Cut::logarithmic: return encode_with<LogarithmicCut>(format, values, count, known, columns, out);
        default: return encode_with<RelativeCut>(format, values, count, known, columns, out);
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
