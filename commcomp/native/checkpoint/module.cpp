// commcomp._checkpoint: the entropy coders of commcomp.checkpoint. Arrays come as contiguous numpy arrays of raw bytes.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "float_codec.hpp"
#include "float_mode.hpp"
#include "instruction_sets.hpp"
#include "lattice.hpp"
#include "symbol_tables.hpp"
#include "symbols.hpp"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ByteMatrix = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutByteMatrix = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

checkpoint::Output fresh_output() {
    thread_local checkpoint::Buffer buffer;
    return checkpoint::Output(buffer);
}

nb::bytes as_bytes(checkpoint::Output &out) { return nb::bytes(reinterpret_cast<const char *>(out.data()), out.size()); }

checkpoint::Format format_named(const std::string &name) {
    if (name == "fp32") return checkpoint::Format::fp32;
    if (name == "bf16") return checkpoint::Format::bf16;
    throw std::invalid_argument("unknown format '" + name + "'; expected fp32 or bf16");
}

std::size_t count_of(checkpoint::Format format, std::size_t bytes) {
    const std::size_t width = format == checkpoint::Format::fp32 ? 4 : 2;
    if (bytes % width != 0) throw std::invalid_argument("values do not fill their bytes");
    return bytes / width;
}

checkpoint::Cut cut_named(const std::string &name) {
    if (name == "linear") return checkpoint::Cut::linear;
    if (name == "logarithmic") return checkpoint::Cut::logarithmic;
    if (name == "relative") return checkpoint::Cut::relative;
    throw std::invalid_argument("unknown cut '" + name + "'; expected linear, logarithmic or relative");
}

checkpoint::Knowledge knowledge_of(const std::string &cut, const std::optional<Floats> &predictions,
                                   const std::optional<Floats> &scales, float scale, unsigned resolution,
                                   checkpoint::Format format, std::size_t count) {
    if ((predictions && predictions->size() != count) || (scales && scales->size() != count))
        throw std::invalid_argument("predictions or scales are not as many as the values");
    const checkpoint::Cut kind = cut_named(cut);
    const unsigned mantissa = format == checkpoint::Format::fp32 ? 23 : 7;
    if (kind == checkpoint::Cut::linear && (resolution < 1 || resolution > 5))
        throw std::invalid_argument("the resolution of a linear cut must be 1 to 5");
    if (kind == checkpoint::Cut::relative && resolution >= mantissa)
        throw std::invalid_argument("the resolution of a relative cut must be below the mantissa's bits");
    return {kind, predictions ? predictions->data() : nullptr, scales ? scales->data() : nullptr, scale, resolution};
}

const std::uint8_t *checked_contexts(const std::optional<Bytes> &contexts, std::size_t count, unsigned num_contexts) {
    if (num_contexts < 1 || num_contexts > checkpoint::kMostContexts) throw std::invalid_argument("num_contexts must be 1 to 255");
    if (!contexts) return nullptr;
    if (contexts->size() != count) throw std::invalid_argument("contexts are not as many as the symbols");
    std::uint8_t most = 0;
    for (std::size_t i = 0; i < count; ++i) most = contexts->data()[i] > most ? contexts->data()[i] : most;
    if (most >= num_contexts) throw std::invalid_argument("a context is not below num_contexts");
    return contexts->data();
}

template <typename A, typename B>
void require_same_shape(const A &one, const B &other) {
    if (one.shape(0) != other.shape(0) || one.shape(1) != other.shape(1))
        throw std::invalid_argument("matrices of one lattice differ in shape");
}

template <typename A>
checkpoint::LatticeKnowledge lattice_knowledge_of(const A &like, bool octaves, const std::optional<Matrix> &predictions,
                                                  const std::optional<Matrix> &references, float step) {
    if (predictions) require_same_shape(like, *predictions);
    if (references) require_same_shape(like, *references);
    return {octaves, predictions ? predictions->data() : nullptr, references ? references->data() : nullptr, step,
            like.shape(0), like.shape(1)};
}

void define_lattice(nb::module_ &module) {
    module.def(
        "cut_on_lattice",
        [](Matrix values, bool octaves, std::optional<Matrix> predictions, std::optional<Matrix> references, float step,
           OutByteMatrix symbols, OutMatrix reconstruction) {
            const auto known = lattice_knowledge_of(values, octaves, predictions, references, step);
            require_same_shape(values, symbols);
            require_same_shape(values, reconstruction);
            nb::gil_scoped_release release;
            checkpoint::cut_on_lattice(values.data(), known, symbols.data(), reconstruction.data());
        },
        nb::arg("values"), nb::arg("octaves"), nb::arg("predictions").none(), nb::arg("references").none(),
        nb::arg("step"), nb::arg("symbols"), nb::arg("reconstruction"));
    module.def(
        "join_on_lattice",
        [](ByteMatrix symbols, bool octaves, std::optional<Matrix> predictions, std::optional<Matrix> references,
           float step, OutMatrix values) {
            const auto known = lattice_knowledge_of(symbols, octaves, predictions, references, step);
            require_same_shape(symbols, values);
            nb::gil_scoped_release release;
            checkpoint::join_on_lattice(symbols.data(), known, values.data());
        },
        nb::arg("symbols"), nb::arg("octaves"), nb::arg("predictions").none(), nb::arg("references").none(),
        nb::arg("step"), nb::arg("values"));
    module.def(
        "lattice_contexts",
        [](Integers rows, Integers columns, std::int32_t base, OutByteMatrix contexts) {
            if (rows.size() != contexts.shape(0) || columns.size() != contexts.shape(1))
                throw std::invalid_argument("the spread's rows and columns are not those of the contexts");
            nb::gil_scoped_release release;
            checkpoint::lattice_contexts(rows.data(), columns.data(), base, rows.size(), columns.size(), contexts.data());
        },
        nb::arg("rows"), nb::arg("columns"), nb::arg("base"), nb::arg("contexts"));
}

}  // namespace

NB_MODULE(_checkpoint, module) {
    module.doc() = "Entropy coders of commcomp.checkpoint.";
    module.def("instruction_sets", &checkpoint::instruction_sets, "What this machine can run, the fastest last.");
    module.def("use", &checkpoint::use, nb::arg("instruction_set"), "Choose one; the fastest is in use from the start.");
    module.def(
        "encode_symbols",
        [](Bytes symbols, std::optional<Bytes> contexts, unsigned num_contexts, std::size_t columns) {
            checkpoint::Output out = fresh_output();
            {
                nb::gil_scoped_release release;
                const std::uint8_t *checked = checked_contexts(contexts, symbols.size(), num_contexts);
                checkpoint::encode_symbols(symbols.data(), checked, symbols.size(), num_contexts, columns, out);
            }
            return as_bytes(out);
        },
        nb::arg("symbols"), nb::arg("contexts").none() = nb::none(), nb::arg("num_contexts") = 1,
        nb::arg("columns") = 0);
    module.def(
        "decode_symbols",
        [](Bytes data, std::optional<Bytes> contexts, unsigned num_contexts, OutBytes out) {
            nb::gil_scoped_release release;
            const std::uint8_t *checked = checked_contexts(contexts, out.size(), num_contexts);
            checkpoint::decode_symbols(data.data(), data.size(), checked, out.size(), num_contexts, out.data());
        },
        nb::arg("data"), nb::arg("contexts").none(), nb::arg("num_contexts"), nb::arg("out"));
    module.def(
        "encode_floats",
        [](const std::string &name, const std::string &cut, Bytes values, std::optional<Floats> predictions,
           std::optional<Floats> scales, float scale, unsigned resolution, std::size_t columns) {
            const checkpoint::Format format = format_named(name);
            const std::size_t count = count_of(format, values.size());
            const auto known = knowledge_of(cut, predictions, scales, scale, resolution, format, count);
            checkpoint::Output out = fresh_output();
            {
                nb::gil_scoped_release release;
                checkpoint::encode_floats(format, values.data(), count, known, columns, out);
            }
            return as_bytes(out);
        },
        nb::arg("format"), nb::arg("cut"), nb::arg("values"), nb::arg("predictions").none(), nb::arg("scales").none(),
        nb::arg("scale"), nb::arg("resolution"), nb::arg("columns") = 0);
    module.def(
        "decode_floats",
        [](const std::string &name, const std::string &cut, Bytes data, std::optional<Floats> predictions,
           std::optional<Floats> scales, float scale, unsigned resolution, OutBytes out) {
            const checkpoint::Format format = format_named(name);
            const std::size_t count = count_of(format, out.size());
            const auto known = knowledge_of(cut, predictions, scales, scale, resolution, format, count);
            nb::gil_scoped_release release;
            checkpoint::decode_floats(format, data.data(), data.size(), count, known, out.data());
        },
        nb::arg("format"), nb::arg("cut"), nb::arg("data"), nb::arg("predictions").none(), nb::arg("scales").none(),
        nb::arg("scale"), nb::arg("resolution"), nb::arg("out"));
    define_lattice(module);
    module.def("use_ieee_floats", &checkpoint::use_ieee_floats, "In this thread; gives the mode before.");
    module.def("set_float_mode", &checkpoint::set_float_mode, nb::arg("mode"), "In this thread.");
}
