#include "float_codec.hpp"

#include "float_cuts.hpp"
#include "rans.hpp"

namespace checkpoint {

namespace {

constexpr std::size_t kBlock = 2048;
constexpr std::size_t kMostLowBits = 56;

template <typename F, template <typename> class CutOf>
std::vector<std::uint8_t> encode(const void *values, std::size_t count, const Knowledge &known) {
    const CutOf<F> way(known);
    std::vector<std::uint8_t> symbols(count), contexts(count);
    BitWriter bits;
    for (std::size_t begin = 0; begin < count; begin += kBlock) {
        const std::size_t end = std::min(begin + kBlock, count);
        bits.reserve((end - begin) * kMostLowBits);
        for (std::size_t i = begin; i < end; ++i) {
            const auto at = way.look(i);
            const Piece piece = way.cut(word_at<typename F::Word>(values, i), at);
            symbols[i] = piece.symbol;
            contexts[i] = static_cast<std::uint8_t>(at.context);
            bits.put(piece.low, piece.low_bits);
        }
    }
    const std::vector<std::uint8_t> &low = bits.finish();
    const std::uint8_t *shown = CutOf<F>::kContexts > 1 ? contexts.data() : nullptr;
    const std::vector<std::uint8_t> coded = encode_symbols(symbols.data(), shown, count, CutOf<F>::kContexts);
    std::vector<std::uint8_t> out(4);
    out.reserve(4 + low.size() + coded.size());
    const auto low_bytes = static_cast<std::uint32_t>(low.size());
    std::memcpy(out.data(), &low_bytes, 4);
    out.insert(out.end(), low.begin(), low.end());
    out.insert(out.end(), coded.begin(), coded.end());
    return out;
}

template <typename F, template <typename> class CutOf>
void decode(const std::uint8_t *data, std::size_t size, std::size_t count, const Knowledge &known, void *values) {
    const CutOf<F> way(known);
    std::uint32_t low_bytes = 0;
    if (size < 4) throw std::invalid_argument("a chunk of values is shorter than its head");
    std::memcpy(&low_bytes, data, 4);
    if (low_bytes > size - 4) throw std::invalid_argument("a chunk of values ends in its low bits");
    std::vector<std::uint8_t> symbols(count), contexts;
    if (CutOf<F>::kContexts > 1) {
        contexts.resize(count);
        for (std::size_t i = 0; i < count; ++i) contexts[i] = static_cast<std::uint8_t>(way.look(i).context);
    }
    decode_symbols(data + 4 + low_bytes, size - 4 - low_bytes, contexts.empty() ? nullptr : contexts.data(), count,
                   CutOf<F>::kContexts, symbols.data());
    BitReader bits(data + 4, low_bytes);
    for (std::size_t begin = 0; begin < count; begin += kBlock) {
        const std::size_t end = std::min(begin + kBlock, count);
        const bool safe = bits.far_from_end((end - begin) * kMostLowBits);
        for (std::size_t i = begin; i < end; ++i)
            put_word_at(values, i, static_cast<typename F::Word>(way.join(symbols[i], way.look(i), bits, safe)));
    }
    if (!bits.at_end()) throw std::invalid_argument("low bits are left over");
}

template <template <typename> class CutOf>
std::vector<std::uint8_t> encode_with(Format format, const void *values, std::size_t count, const Knowledge &known) {
    return format == Format::fp32 ? encode<Fp32, CutOf>(values, count, known)
                                  : encode<Bf16, CutOf>(values, count, known);
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
