// A libFuzzer target: decode_symbols of both coders. What it accepts must come back from encode_symbols of both.
#include <stdexcept>

#include "input.hpp"
#include "symbols.hpp"

using namespace checkpoint;
using fuzz::Bytes;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    fuzz::Input in(data, size);
    const unsigned num_contexts = in.take<std::uint8_t>() % 255 + 1, flags = in.take<std::uint8_t>();
    const std::size_t count = in.take_count();
    Bytes contexts;
    if (flags & 1) {
        const std::size_t period = in.take<std::uint8_t>() % 16 + 1;
        contexts = in.take_repeated<std::uint8_t>(period, count);
        for (std::uint8_t &context : contexts) context = static_cast<std::uint8_t>(context % num_contexts);
    }
    const std::uint8_t *shown = flags & 1 ? contexts.data() : nullptr;
    const Bytes stream = in.rest();
    Bytes symbols(count), again(count);
    try {
        decode_symbols(stream.data(), stream.size(), shown, count, num_contexts, symbols.data());
    } catch (const std::invalid_argument &) {
        return 0;
    }
    for (const std::size_t columns : {std::size_t{0}, count > 0 ? flags % count + 1 : 0}) {
        Buffer buffer;
        Output out(buffer);
        encode_symbols(symbols.data(), shown, count, num_contexts, columns, out);
        const Bytes coded = fuzz::bytes_of(out);
        decode_symbols(coded.data(), coded.size(), shown, count, num_contexts, again.data());
        fuzz::require(again == symbols, "symbols that were decoded do not come back");
    }
    return 0;
}
