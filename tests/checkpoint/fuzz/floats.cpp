// A libFuzzer target: decode_floats in every cut and format. What it accepts must come back from encode_floats, which
// must write the same bytes with all instruction sets.
#include <stdexcept>
#include <utility>

#include "float_codec.hpp"
#include "input.hpp"
#include "instruction_sets.hpp"
#include "symbols.hpp"

using namespace checkpoint;
using fuzz::Bytes;

namespace {

struct Task {
    Format format;
    Cut cut;
    unsigned resolution;
    std::size_t count, columns;
    float scale;
    std::vector<float> predictions, scales;
    Bytes chunk;

    Knowledge known() const {
        return {cut, predictions.empty() ? nullptr : predictions.data(), scales.empty() ? nullptr : scales.data(),
                scale, resolution};
    }
    std::size_t bytes() const { return count * (format == Format::fp32 ? 4 : 2); }
};

// A chunk whose symbols are as the input says, so that what comes after them is reached.
Bytes chunk_of_symbols(fuzz::Input &in, std::size_t count) {
    const std::size_t period = in.take<std::uint8_t>() + std::size_t{1};
    const Bytes symbols = in.take_repeated<std::uint8_t>(period, count);
    const Bytes low = in.rest();
    const auto low_bytes = static_cast<std::uint32_t>(low.size());
    Buffer buffer;
    Output chunk(buffer);
    chunk.add(&low_bytes, 4);
    chunk.add(low.data(), low.size());
    encode_symbols(symbols.data(), nullptr, count, 1, 0, chunk);
    return fuzz::bytes_of(chunk);
}

Task read(fuzz::Input in) {
    const unsigned flags = in.take<std::uint8_t>(), resolution = in.take<std::uint8_t>();
    Task task{};
    task.format = flags & 1 ? Format::bf16 : Format::fp32;
    constexpr Cut cuts[] = {Cut::linear, Cut::logarithmic, Cut::relative, Cut::linear};
    task.cut = cuts[flags >> 1 & 3];
    const unsigned mantissa = task.format == Format::fp32 ? 23 : 7;
    task.resolution = task.cut == Cut::linear ? resolution % 5 + 1 : resolution % mantissa;
    task.count = in.take_count();
    task.columns = flags & 64 && task.count > 0 ? resolution % task.count + 1 : 0;
    const auto pattern = in.take<std::uint32_t>();
    std::memcpy(&task.scale, &pattern, 4);
    for (auto [bit, floats] : {std::pair{8u, &task.predictions}, {16u, &task.scales}}) {
        if (!(flags & bit)) continue;
        const std::size_t period = in.take<std::uint8_t>() % 8 + 1;
        *floats = in.take_repeated<float>(period, task.count);
    }
    task.chunk = flags & 32 ? chunk_of_symbols(in, task.count) : in.rest();
    return task;
}

Bytes encoded(const Task &task, const Bytes &values) {
    Buffer buffer;
    Output out(buffer);
    encode_floats(task.format, values.data(), task.count, task.known(), task.columns, out);
    return fuzz::bytes_of(out);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    const Task task = read(fuzz::Input(data, size));
    Bytes values(task.bytes()), again(task.bytes());
    use("plain");
    try {
        decode_floats(task.format, task.chunk.data(), task.chunk.size(), task.count, task.known(), values.data());
    } catch (const std::invalid_argument &) {
        return 0;
    }
    const Bytes coded = encoded(task, values);
    for (const std::string &name : instruction_sets()) {
        use(name);
        fuzz::require(encoded(task, values) == coded, "an instruction set writes other bytes");
        decode_floats(task.format, coded.data(), coded.size(), task.count, task.known(), again.data());
        fuzz::require(again == values, "values that were decoded do not come back");
    }
    return 0;
}
