#include "rans.hpp"

#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "symbol_tables.hpp"

namespace checkpoint {

namespace {

constexpr unsigned kLanes = 8;
constexpr std::uint32_t kLeast = 1u << 15;  // states are in [2^15, 2^31), so that division by multiplication is exact

// One symbol's part in the encoder: x becomes (x / f) << 12 + x % f + start, without dividing.
struct EncoderEntry {
    std::uint32_t limit;       // renormalise from here on
    std::uint32_t reciprocal;  // of the frequency
    std::uint32_t bias;
    std::uint16_t complement;  // kScale - frequency
    std::uint16_t shift;
};

EncoderEntry encoder_entry(std::uint32_t start, std::uint32_t frequency) {
    EncoderEntry entry{};
    entry.limit = frequency << (31 - kScaleBits);
    entry.complement = static_cast<std::uint16_t>(kScale - frequency);
    if (frequency < 2) {  // x / 1 would need 33 bits: (x * (2^32 - 1)) >> 32 is x - 1
        entry.reciprocal = ~0u;
        entry.bias = start + kScale - 1;
        return entry;
    }
    unsigned shift = 0;
    while (frequency > (1u << shift)) ++shift;
    entry.reciprocal = static_cast<std::uint32_t>(((std::uint64_t{1} << (shift + 31)) + frequency - 1) / frequency);
    entry.shift = static_cast<std::uint16_t>(shift - 1);
    entry.bias = start;
    return entry;
}

struct EncoderTable {
    std::array<EncoderEntry, 256> of;
};

EncoderTable encoder_table(const Frequencies &table) {
    EncoderTable entries{};
    std::uint32_t start = 0;
    for (unsigned symbol = 0; symbol < 256; ++symbol) {
        const std::uint32_t frequency = table.of[symbol];
        if (frequency > 0) entries.of[symbol] = encoder_entry(start, frequency);
        start += frequency;
    }
    return entries;
}

// Slot to symbol (8 bits), frequency - 1 (12) and place in it (12).
using DecoderTable = std::array<std::uint32_t, kScale>;

void fill_decoder_table(const Frequencies &table, DecoderTable &slots) {
    std::uint32_t slot = 0;
    for (std::uint32_t symbol = 0; symbol < 256; ++symbol)
        for (std::uint32_t place = 0; place < table.of[symbol]; ++place)
            slots[slot++] = symbol | (table.of[symbol] - 1u) << 8 | place << 20;
}

// Writes two bytes before `end` whether they count or not: which it is cannot be foreseen.
inline void put_symbol(std::uint32_t &state, const EncoderEntry &entry, std::uint8_t *&end) {
    const auto word = static_cast<std::uint16_t>(state);
    std::memcpy(end - 2, &word, 2);
    const bool renormalise = state >= entry.limit;
    end -= renormalise ? 2 : 0;
    state = renormalise ? state >> 16 : state;
    const std::uint32_t quotient =
        static_cast<std::uint32_t>((state * std::uint64_t{entry.reciprocal}) >> 32) >> entry.shift;
    state += entry.bias + quotient * entry.complement;
}

struct Words {
    const std::uint8_t *begin, *end;
    std::array<std::uint32_t, kLanes> states;
};

// Backwards, since a decoder goes forwards. The words lie in `buffer`.
Words encode_words(const std::uint8_t *symbols, const std::uint8_t *contexts, std::size_t count,
                   const std::vector<EncoderTable> &tables, const std::vector<std::uint8_t> &table_of,
                   Buffer &buffer) {
    const std::size_t size = 2 * count + 2;
    std::uint8_t *end = buffer.room(0, size) + size;
    Words words{nullptr, end, {}};
    words.states.fill(kLeast);
    std::vector<const EncoderEntry *> of_context;
    for (const std::uint8_t table : table_of) of_context.push_back(tables[table].of.data());
    const EncoderEntry *const *const by_context = of_context.data();
    const EncoderEntry *const only = by_context[0];
    const auto entry = [&](std::size_t i) -> const EncoderEntry & {
        return (contexts == nullptr ? only : by_context[contexts[i]])[symbols[i]];
    };
    std::size_t i = count;
    for (; i % kLanes != 0; --i) put_symbol(words.states[(i - 1) % kLanes], entry(i - 1), end);
    std::array<std::uint32_t, kLanes> states = words.states;
    for (; i > 0; i -= kLanes)
        for (unsigned lane = kLanes; lane-- > 0;) put_symbol(states[lane], entry(i - kLanes + lane), end);
    words.states = states;
    words.begin = end;
    return words;
}

std::vector<Counts> count_symbols(const std::uint8_t *symbols, const std::uint8_t *contexts, std::size_t count,
                                  unsigned num_contexts) {
    std::vector<Counts> counts(num_contexts, Counts{});
    if (contexts == nullptr) {
        for (std::size_t i = 0; i < count; ++i) ++counts[0][symbols[i]];
        return counts;
    }
    for (std::size_t i = 0; i < count; ++i) ++counts[contexts[i]][symbols[i]];
    return counts;
}

std::uint32_t load32(const std::uint8_t *from) {
    std::uint32_t value;
    std::memcpy(&value, from, 4);
    return value;
}

struct Decoder {
    std::vector<const DecoderTable *> of_context;
    std::unique_ptr<DecoderTable[]> tables;
    std::size_t bytes_used;
};

Decoder read_tables(const std::uint8_t *data, std::size_t size, unsigned num_contexts) {
    if (size < 1) throw std::invalid_argument("a stream of symbols is empty");
    const unsigned num_tables = data[0];
    const std::size_t map_bytes = num_tables > 1 ? num_contexts : 0;
    if (num_tables == 0 || num_tables > num_contexts || size < 1 + map_bytes)
        throw std::invalid_argument("a stream of symbols has an impossible number of tables");
    Decoder decoder;
    decoder.tables = std::make_unique<DecoderTable[]>(num_tables);
    BitReader bits(data + 1 + map_bytes, size - 1 - map_bytes);
    for (unsigned table = 0; table < num_tables; ++table) fill_decoder_table(read_table(bits), decoder.tables[table]);
    for (unsigned context = 0; context < num_contexts; ++context) {
        const unsigned table = num_tables > 1 ? data[1 + context] : 0;
        if (table >= num_tables) throw std::invalid_argument("a context has a table that is not there");
        decoder.of_context.push_back(&decoder.tables[table]);
    }
    decoder.bytes_used = 1 + map_bytes + bits.bytes_used();
    return decoder;
}

inline std::uint8_t take_symbol(std::uint32_t &state, const DecoderTable &table, const std::uint8_t *&at) {
    const std::uint32_t entry = table[state & (kScale - 1)];
    state = ((entry >> 8 & (kScale - 1)) + 1) * (state >> kScaleBits) + (entry >> 20);
    std::uint16_t word;
    std::memcpy(&word, at, 2);
    const bool renormalise = state < kLeast;
    state = renormalise ? state << 16 | word : state;
    at += renormalise ? 2 : 0;
    return static_cast<std::uint8_t>(entry);
}

}  // namespace

void encode_rans(const std::uint8_t *symbols, const std::uint8_t *contexts, std::size_t count, unsigned num_contexts,
                 Output &out) {
    if (count == 0) return;
    const TablePlan plan = plan_tables(count_symbols(symbols, contexts, count, num_contexts));
    *out.grow(1) = static_cast<std::uint8_t>(plan.tables.size());
    if (plan.tables.size() > 1) out.add(plan.table_of.data(), num_contexts);
    BitWriter bits(out);
    std::vector<EncoderTable> tables;
    for (const Frequencies &table : plan.tables) {
        write_table(table, bits);
        tables.push_back(encoder_table(table));
    }
    bits.finish();
    thread_local Buffer buffer;
    const Words words = encode_words(symbols, contexts, count, tables, plan.table_of, buffer);
    for (const std::uint32_t state : words.states)
        for (unsigned byte = 0; byte < 4; ++byte) *out.grow(1) = static_cast<std::uint8_t>(state >> 8 * byte);
    out.add(words.begin, static_cast<std::size_t>(words.end - words.begin));
}

void decode_rans(const std::uint8_t *data, std::size_t size, const std::uint8_t *contexts, std::size_t count,
                 unsigned num_contexts, std::uint8_t *symbols) {
    if (count == 0) {
        if (size != 0) throw std::invalid_argument("there are bytes where no symbols are");
        return;
    }
    const Decoder decoder = read_tables(data, size, num_contexts);
    if (size < decoder.bytes_used + 4 * kLanes) throw std::invalid_argument("a stream of symbols ends in its states");
    std::array<std::uint32_t, kLanes> states;
    for (unsigned lane = 0; lane < kLanes; ++lane) states[lane] = load32(data + decoder.bytes_used + 4 * lane);
    const std::uint8_t *at = data + decoder.bytes_used + 4 * kLanes;
    const std::uint8_t *const end = data + size;

    const DecoderTable *const *const tables = decoder.of_context.data();
    std::size_t i = 0;
    const DecoderTable &only = *tables[0];
    for (; i + kLanes <= count && end - at >= static_cast<std::ptrdiff_t>(2 * kLanes + 2); i += kLanes) {
        if (contexts == nullptr)
            for (unsigned lane = 0; lane < kLanes; ++lane) symbols[i + lane] = take_symbol(states[lane], only, at);
        else
            for (unsigned lane = 0; lane < kLanes; ++lane)
                symbols[i + lane] = take_symbol(states[lane], *tables[contexts[i + lane]], at);
    }
    for (; i < count; ++i) {
        // Near the end: from a copy, so that nothing beyond it is read.
        std::uint8_t rest[2] = {0, 0};
        const std::ptrdiff_t left = end - at;
        std::memcpy(rest, at, static_cast<std::size_t>(left < 2 ? left : 2));
        const std::uint8_t *place = rest;
        symbols[i] = take_symbol(states[i % kLanes], *tables[contexts == nullptr ? 0 : contexts[i]], place);
        if (place - rest > left) throw std::invalid_argument("a stream of symbols ends early");
        at += place - rest;
    }
    if (at != end) throw std::invalid_argument("a stream of symbols is longer than its symbols need");
    for (const std::uint32_t state : states)
        if (state != kLeast) throw std::invalid_argument("a stream of symbols does not end as it must");
}

}  // namespace checkpoint
