// Compiled once for every instruction set, with KERNELS (its name) defined.
#include "float_kernels.hpp"

#include "float_cuts.hpp"

namespace checkpoint {

namespace {

template <typename F, template <typename> class CutOf>
void cut(const void *values, const BlockKnowledge &known, std::size_t count, std::uint8_t *symbols,
         std::uint8_t *contexts, LowBits &low) {
    const void *const predictions = known.predictions, *const scales = known.scales;
    std::uint32_t *const lows = low.low.data(), *const counts = low.count.data();
    const CutOf<F> way(known.resolution);
#pragma GCC ivdep
    for (std::size_t i = 0; i < count; ++i) {
        const auto at = way.look(word_at<std::uint32_t>(predictions, i), word_at<std::uint32_t>(scales, i));
        const Piece piece = way.cut(word_at<typename F::Word>(values, i), at);
        lows[i] = piece.low;
        counts[i] = piece.low_bits;
        symbols[i] = static_cast<std::uint8_t>(piece.symbol);
        contexts[i] = static_cast<std::uint8_t>(at.context);
    }
}

template <typename F, template <typename> class CutOf>
void contexts_of(const BlockKnowledge &known, std::size_t count, std::uint8_t *contexts) {
    const void *const predictions = known.predictions, *const scales = known.scales;
    const CutOf<F> way(known.resolution);
#pragma GCC ivdep
    for (std::size_t i = 0; i < count; ++i)
        contexts[i] = static_cast<std::uint8_t>(
            way.look(word_at<std::uint32_t>(predictions, i), word_at<std::uint32_t>(scales, i)).context);
}

template <typename F>
constexpr std::array<FloatKernels, 3> of_format() {
    return {{{&cut<F, LinearCut>, &contexts_of<F, LinearCut>},
             {&cut<F, LogarithmicCut>, &contexts_of<F, LogarithmicCut>},
             {&cut<F, RelativeCut>, &contexts_of<F, RelativeCut>}}};
}

}  // namespace

namespace KERNELS {
extern const FloatKernelTable float_kernels;
const FloatKernelTable float_kernels = {of_format<Fp32>(), of_format<Bf16>()};
}  // namespace KERNELS

}  // namespace checkpoint
