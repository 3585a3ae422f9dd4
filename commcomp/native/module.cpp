// commcomp._native: what torch's operations cannot do in one pass over memory. Addresses come as integers
// (Tensor.data_ptr()); commcomp/compressors/native*.py check what lies there.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>

#include "codec_bindings.hpp"
#include "instruction_sets.hpp"
#include "pieces.hpp"
#include "row_codec.hpp"

namespace nb = nanobind;
using std::ptrdiff_t;

namespace {

const float *read(std::uintptr_t address) { return reinterpret_cast<const float *>(address); }
float *write(std::uintptr_t address) { return reinterpret_cast<float *>(address); }
std::int8_t *codes_at(std::uintptr_t address) { return reinterpret_cast<std::int8_t *>(address); }

// Where the factors of matrix `index` begin.
float *left_of(const LowRankBatch &batch, std::uintptr_t factors, ptrdiff_t index) {
    return write(factors) + index * batch.rank * batch.rows;
}
float *right_of(const LowRankBatch &batch, std::uintptr_t factors, ptrdiff_t index) {
    return write(factors) + index * batch.rank * batch.columns;
}

// A pass that takes both factors and writes matrices.
template <auto Pass>
void with_both(const LowRankBatch &batch, std::uintptr_t left, std::uintptr_t right, ptrdiff_t threads) {
    const auto pass = instruction_set().low_rank->*Pass;
    over_pieces(batch.matrices, batch.rows, threads, [&](ptrdiff_t index, ptrdiff_t begin, ptrdiff_t end) {
        pass(batch, index, left_of(batch, left, index), right_of(batch, right, index), begin, end);
    });
}

const nb::call_guard<nb::gil_scoped_release> without_gil;

}  // namespace

NB_MODULE(_native, module) {
    nb::set_leak_warnings(false);  // a step that a user's exception cut off keeps its batches until the very end
    module.doc() = "Passes over gradients that torch's operations cannot make in one go.";
    module.def("instruction_sets", &instruction_sets, "What this machine can run, the fastest last.");
    module.def("use", &use, nb::arg("instruction_set"), "Choose one; the fastest is in use from the start.");

    nb::class_<LowRankBatch>(module, "LowRankBatch")
        .def(
            "__init__",
            [](LowRankBatch *self, std::uintptr_t gradient, ptrdiff_t gradient_stride, std::uintptr_t residual,
               ptrdiff_t residual_stride, ptrdiff_t matrices, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t rank) {
                new (self) LowRankBatch{write(gradient), gradient_stride, write(residual), residual_stride,
                                        matrices,        rows,            columns,         rank};
            },
            nb::arg("gradient"), nb::arg("gradient_stride"), nb::arg("residual"), nb::arg("residual_stride"),
            nb::arg("matrices"), nb::arg("rows"), nb::arg("columns"), nb::arg("rank"))
        .def(
            "left_factor",
            [](const LowRankBatch &self, std::uintptr_t right, float scale, std::uintptr_t out, ptrdiff_t threads) {
                const auto pass = instruction_set().low_rank->left_factor;
                over_pieces(self.matrices, self.rows, threads,
                            [&](ptrdiff_t index, ptrdiff_t begin, ptrdiff_t end) {
                    pass(self, index, right_of(self, right, index), scale, left_of(self, out, index), begin, end);
                });
            },
            nb::arg("right"), nb::arg("scale"), nb::arg("out"), nb::arg("threads"), without_gil)
        .def(
            "right_factor",
            [](const LowRankBatch &self, std::uintptr_t left, float scale, bool form, std::uintptr_t out,
               ptrdiff_t threads) {
                const auto pass = instruction_set().low_rank->right_factor;
                over_pieces(self.matrices, self.columns, threads,
                            [&](ptrdiff_t index, ptrdiff_t begin, ptrdiff_t end) {
                                pass(self, index, left_of(self, left, index), scale, form,
                                     right_of(self, out, index), begin, end);
                            });
            },
            nb::arg("left"), nb::arg("scale"), nb::arg("form"), nb::arg("out"), nb::arg("threads"), without_gil)
        .def("subtract", with_both<&LowRankKernels::subtract>, nb::arg("left"), nb::arg("right"), nb::arg("threads"),
             without_gil)
        .def("reconstruct", with_both<&LowRankKernels::reconstruct>, nb::arg("left"), nb::arg("right"),
             nb::arg("threads"), without_gil);

    module.def(
        "encode_rows",
        [](std::uintptr_t values, ptrdiff_t rows, ptrdiff_t length, std::uintptr_t codes, std::uintptr_t scales) {
            row_codec::encode(read(values), rows, length, codes_at(codes), write(scales));
        },
        nb::arg("values"), nb::arg("rows"), nb::arg("length"), nb::arg("codes"), nb::arg("scales"),
        without_gil);
    module.def(
        "decode_rows",
        [](std::uintptr_t codes, std::uintptr_t scales, ptrdiff_t rows, ptrdiff_t length, std::uintptr_t out) {
            row_codec::decode(codes_at(codes), read(scales), rows, length, write(out));
        },
        nb::arg("codes"), nb::arg("scales"), nb::arg("rows"), nb::arg("length"), nb::arg("out"),
        without_gil);
    module.def(
        "decode_mean_of_rows",
        [](std::uintptr_t codes, std::uintptr_t scales, ptrdiff_t ranks, ptrdiff_t stride, ptrdiff_t rows,
           ptrdiff_t length, std::uintptr_t out) {
            row_codec::decode_mean(codes_at(codes), read(scales), ranks, stride, rows, length, write(out));
        },
        nb::arg("codes"), nb::arg("scales"), nb::arg("ranks"), nb::arg("stride"), nb::arg("rows"), nb::arg("length"),
        nb::arg("out"), without_gil);
    bind_codecs(module);
}
