#include "codec_bindings.hpp"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "instruction_sets.hpp"
#include "pieces.hpp"

namespace nb = nanobind;
using std::ptrdiff_t;
using std::uintptr_t;

namespace {

template <typename Value>
Value *at(uintptr_t address) {
    return reinterpret_cast<Value *>(address);
}

ptrdiff_t blocks_of(const BlockCode &code) { return code.rows * ((code.length + code.block - 1) / code.block); }

void encode_blocks(const BlockCode &code, uintptr_t values, ptrdiff_t stride, std::uint32_t mask,
                   std::optional<std::uint64_t> seed, uintptr_t codes, uintptr_t scales, ptrdiff_t threads) {
    const auto pass = instruction_set().blocks->encode;
    over_pieces(1, blocks_of(code), threads, [&](ptrdiff_t, ptrdiff_t begin, ptrdiff_t end) {
        std::vector<float> scratch(2 * code.block);
        pass(code, at<const float>(values), stride, mask, seed ? &*seed : nullptr, at<std::uint8_t>(codes),
             at<std::uint16_t>(scales), begin, end, scratch.data());
    });
}

void decode_blocks(const BlockCode &code, uintptr_t codes, uintptr_t scales, ptrdiff_t ranks, ptrdiff_t distance,
                   uintptr_t total, ptrdiff_t total_stride, uintptr_t out, ptrdiff_t out_stride, ptrdiff_t threads) {
    const auto pass = instruction_set().blocks->decode;
    over_pieces(1, blocks_of(code), threads, [&](ptrdiff_t, ptrdiff_t begin, ptrdiff_t end) {
        std::vector<float> scratch(2 * code.block);
        pass(code, at<const std::uint8_t>(codes), at<const std::uint8_t>(scales), ranks, distance,
             at<const float>(total), total_stride, at<float>(out), out_stride, begin, end, scratch.data());
    });
}

ptrdiff_t blocks_of(const SparsePlaces &places) { return (places.length + kSparseBlock - 1) / kSparseBlock; }

// Places that blocks before `block` take.
ptrdiff_t places_before(const SparsePlaces &places, ptrdiff_t shift, ptrdiff_t block) {
    ptrdiff_t total = 0;
    if (places.bitmap != nullptr)
        for (ptrdiff_t byte = 0; byte < block * (kSparseBlock / 8); ++byte)
            total += __builtin_popcount(places.bitmap[shift + byte]);
    else
        for (ptrdiff_t one = 0; one < block; ++one) total += places.counts[shift + one];
    return std::min(total, places.capacity);
}

// Unused places hold zeros, and offsets of the position `length`.
void select_sparse(const SparsePlaces &places, uintptr_t values, float threshold, uintptr_t chosen,
                   ptrdiff_t threads) {
    const SparseKernels &kernels = *instruction_set().sparse;
    const float *const from = at<const float>(values);
    float *const to = at<float>(chosen);
    const ptrdiff_t blocks = blocks_of(places);
    const bool by_offsets = places.bitmap == nullptr;
    std::vector<ptrdiff_t> found(blocks + 1);  // by the block that a piece begins with
    if (threads > 1)
        over_pieces(1, blocks, threads, [&](ptrdiff_t, ptrdiff_t begin, ptrdiff_t end) {
            found[begin] = kernels.count(from, places.length, threshold, by_offsets, begin, end);
        });
    std::fill(to, to + places.capacity, 0.0f);
    if (by_offsets)
        std::fill(places.offsets, places.offsets + places.capacity, static_cast<std::uint8_t>(places.length));
    std::atomic<bool> bad{false};
    over_pieces(1, blocks, threads, [&](ptrdiff_t, ptrdiff_t begin, ptrdiff_t end) {
        ptrdiff_t start = 0;
        for (ptrdiff_t block = 0; block < begin; ++block) start += found[block];
        start = std::min(start, places.capacity);
        if (kernels.select(from, threshold, places, start, begin, end, to)) bad = true;
    });
    // What is not finite may be past the places there are: then it must show in what is sent all the same.
    if (bad) to[0] = std::numeric_limits<float>::quiet_NaN();
}

void decode_sparse(const SparsePlaces &first, uintptr_t values, ptrdiff_t ranks, ptrdiff_t distance, uintptr_t total,
                   uintptr_t out, ptrdiff_t threads) {
    const auto pass = instruction_set().sparse->decode;
    const SparseRows rows{first, ranks, distance, at<const float>(values), at<const float>(total), at<float>(out)};
    over_pieces(1, blocks_of(first), threads, [&](ptrdiff_t, ptrdiff_t begin, ptrdiff_t end) {
        std::vector<ptrdiff_t> used(ranks);
        for (ptrdiff_t rank = 0; rank < ranks; ++rank) used[rank] = places_before(first, rank * distance, begin);
        pass(rows, used.data(), begin, end);
    });
}

// `starts`: int64 [blocks + 1], where each block of rows begins, and their end.
void nearest_leaders(uintptr_t rows, ptrdiff_t length, uintptr_t starts, ptrdiff_t blocks, uintptr_t reach,
                     uintptr_t out, ptrdiff_t threads) {
    const auto pass = instruction_set().nearest->leaders;
    const std::int64_t *const start = at<const std::int64_t>(starts);
    over_pieces(blocks, 1, threads, [&](ptrdiff_t block, ptrdiff_t, ptrdiff_t) {
        std::vector<float> scratch(nearest::scratch(start[block + 1] - start[block], length));
        pass(at<const float>(rows), length, at<const float>(reach), start[block], start[block + 1],
             at<std::int64_t>(out), scratch.data());
    });
}

}  // namespace

void bind_codecs(nb::module_ &module) {
    const nb::call_guard<nb::gil_scoped_release> without_gil;
    nb::class_<BlockCode>(module, "BlockCode")
        .def(
            "__init__",
            [](BlockCode *self, ptrdiff_t rows, ptrdiff_t length, ptrdiff_t block, int bits, uintptr_t signs) {
                new (self) BlockCode{rows, length, block, bits, at<const float>(signs)};
            },
            nb::arg("rows"), nb::arg("length"), nb::arg("block"), nb::arg("bits"), nb::arg("signs"))
        .def("encode", encode_blocks, nb::arg("values"), nb::arg("stride"), nb::arg("mask"), nb::arg("seed").none(),
             nb::arg("codes"), nb::arg("scales"), nb::arg("threads"), without_gil)
        .def("decode", decode_blocks, nb::arg("codes"), nb::arg("scales"), nb::arg("ranks"), nb::arg("distance"),
             nb::arg("total"), nb::arg("total_stride"), nb::arg("out"), nb::arg("out_stride"), nb::arg("threads"),
             without_gil);

    nb::class_<SparsePlaces>(module, "SparsePlaces")
        .def(
            "__init__",
            [](SparsePlaces *self, ptrdiff_t length, ptrdiff_t capacity, uintptr_t counts, uintptr_t offsets,
               uintptr_t bitmap) {
                new (self) SparsePlaces{length, capacity, at<std::uint8_t>(counts), at<std::uint8_t>(offsets),
                                        at<std::uint8_t>(bitmap)};
            },
            nb::arg("length"), nb::arg("capacity"), nb::arg("counts"), nb::arg("offsets"), nb::arg("bitmap"))
        .def("select", select_sparse, nb::arg("values"), nb::arg("threshold"), nb::arg("chosen"), nb::arg("threads"),
             without_gil)
        .def("decode", decode_sparse, nb::arg("values"), nb::arg("ranks"), nb::arg("distance"), nb::arg("total"),
             nb::arg("out"), nb::arg("threads"), without_gil);

    module.def("nearest_leaders", nearest_leaders, nb::arg("rows"), nb::arg("length"), nb::arg("starts"),
               nb::arg("blocks"), nb::arg("reach"), nb::arg("out"), nb::arg("threads"), without_gil);
}
