// A libFuzzer target: decode_symbols; what it accepts must come back from encode_symbols.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "input.hpp"
#include "rans.hpp"

using fuzz::Bytes;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    fuzz::Input in(data, size);
    const unsigned num_contexts = in.take<std::uint8_t>() % 255 + 1;
    const bool has_contexts = in.take<std::uint8_t>() & 1;
    const std::size_t count = in.take_count();
    Bytes contexts;
    if (has_contexts) {
        contexts = in.take_repeated<std::uint8_t>(in.take<std::uint8_t>() % 16 + 1, count);
        for (std::uint8_t &context : contexts) context = static_cast<std::uint8_t>(context % num_contexts);
    }
    const std::uint8_t *shown = has_contexts ? contexts.data() : nullptr;
    const Bytes stream = in.rest();
    Bytes symbols(count), again(count);
    try {
        checkpoint::decode_symbols(stream.data(), stream.size(), shown, count, num_contexts, symbols.data());
    } catch (const std::invalid_argument &) {
        return 0;
    }
    const Bytes coded = checkpoint::encode_symbols(symbols.data(), shown, count, num_contexts);
    checkpoint::decode_symbols(coded.data(), coded.size(), shown, count, num_contexts, again.data());
    if (symbols != again) {
        std::fputs("symbols that were decoded do not come back\n", stderr);
        std::abort();
    }
    return 0;
}
