#include "mixing.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace checkpoint {

namespace {

constexpr int kOne = 1 << 16;      // probabilities
constexpr int kLogitLimit = 2047;  // logits in 256ths, cut to plus and minus eight
constexpr std::size_t kInputs = 5, kHeadBytes = 6;
constexpr unsigned kNodes = 256;  // decision 0: whether it is the most common symbol; the others: a tree of its bits

std::int64_t within(std::int64_t value, std::int64_t limit) { return std::min(std::max(value, -limit), limit); }

// 2^16 / (1 + exp(-x)), by linear interpolation between quarters.
int probability_of(int logit) {
    static constexpr std::array<int, 65> kQuarters = {
        22, 28, 36, 47, 60, 77, 98, 126, 162, 208, 267, 342, 439, 562, 720, 922, 1179, 1506, 1921, 2446, 3108, 3938,
        4971, 6249, 7812, 9702, 11955, 14595, 17625, 21025, 24743, 28693, 32768, 36843, 40793, 44511, 47911, 50941,
        53581, 55834, 57724, 59287, 60565, 61598, 62428, 63090, 63615, 64030, 64357, 64614, 64816, 64974, 65097,
        65194, 65269, 65328, 65374, 65410, 65438, 65459, 65476, 65489, 65500, 65508, 65514};
    const int place = std::min(std::max(logit, -kLogitLimit), kLogitLimit) + 2048, part = place & 63;
    const auto quarter = static_cast<std::size_t>(place >> 6);
    const int value = (kQuarters[quarter] * (64 - part) + kQuarters[quarter + 1] * part) >> 6;
    return std::min(std::max(value, 16), kOne - 16);
}

// The inverse, for probabilities in 4096ths.
struct Logits {
    std::array<std::int16_t, 4096> of;
    Logits() : of{} {
        int logit = -kLogitLimit;
        for (int share = 0; share < 4096; ++share) {
            while (logit < kLogitLimit && probability_of(logit) < share * 16 + 8) ++logit;
            of[static_cast<std::size_t>(share)] = static_cast<std::int16_t>(logit);
        }
    }
};

// How often a decision was 1 in one context: a mean that settles.
struct Estimate {
    std::uint16_t probability = kOne / 2, seen = 0;

    void learn(int bit) {
        static constexpr int kMostSeen = 255;
        const int target = bit ? kOne - 1 : 0;
        probability = static_cast<std::uint16_t>(probability + (target - probability) * 2 / (2 * seen + 3));
        if (seen < kMostSeen) ++seen;
    }
};

// Contexts of the symbol at hand; both sides go through the matrix alike.
class Surroundings {
  public:
    Surroundings(std::size_t columns)
        : columns_(columns), above_(columns + 2, 0), above_that_(columns, 0),
          column_means_(columns, 0) {}

    static std::size_t sizes(std::size_t input, std::size_t columns, unsigned num_contexts) {
        const std::size_t wide = std::size_t{num_contexts} * kNodes;
        const std::array<std::size_t, kInputs> all = {wide, 16 * wide, 64 * kNodes, 144 * kNodes, columns + wide};
        return all[input];
    }

    // For decision 0; the other decisions of the symbol lie `node` further on, but for the last input.
    std::array<std::size_t, kInputs> places(unsigned context) const {
        const unsigned left = left_, up = above_[column_ + 1];
        const unsigned lefts = std::min(left + left_of_that_, 3u), ups = std::min(up + above_that_[column_], 3u);
        const unsigned corners = std::min(above_[column_] + 0u + above_[column_ + 2], 3u);
        return {context * std::size_t{kNodes}, ((context * 4 + left) * 4 + up) * std::size_t{kNodes},
                ((lefts * 4 + ups) * 4 + corners) * std::size_t{kNodes},
                (magnitude(row_mean_) * 12 + magnitude(column_means_[column_])) * std::size_t{kNodes}, column_};
    }

    std::size_t last_place(unsigned context, unsigned node) const {
        return node == 0 ? column_ : columns_ + context * std::size_t{kNodes} + node;
    }

    void move_on(int distance) {
        const int size = std::min(distance < 0 ? -distance : distance, 255);
        row_mean_ += (size * 256 - row_mean_) / 16;
        column_means_[column_] += (size * 256 - column_means_[column_]) / 16;
        above_that_[column_] = above_[column_ + 1];
        // What is above the next symbol's left is still needed: it is replaced a step later.
        if (column_ > 0) above_[column_] = waiting_;
        const unsigned now = size == 0 ? 0u : size <= 2 ? 1u : size <= 8 ? 2u : 3u;
        waiting_ = static_cast<std::uint8_t>(now);
        left_of_that_ = left_;
        left_ = now;
        if (++column_ == columns_) {
            above_[column_] = waiting_;
            column_ = 0;
            left_ = left_of_that_ = 0;
            row_mean_ = 0;
        }
    }

  private:
    static std::size_t magnitude(int mean) {
        std::size_t bits = 0;
        while (bits < 11 && mean >> bits != 0) ++bits;
        return bits;
    }

    std::size_t columns_;
    std::vector<std::uint8_t> above_, above_that_;  // sizes in the rows before; of the first with one more at each end
    std::vector<int> column_means_;
    std::size_t column_ = 0;
    unsigned left_ = 0, left_of_that_ = 0;
    std::uint8_t waiting_ = 0;
    int row_mean_ = 0;
};

// The probabilities of one stream's decisions, which learn from each.
class Mixer {
  public:
    Mixer(std::size_t columns, unsigned num_contexts) : weights_(num_contexts * std::size_t{2}) {
        for (std::size_t input = 0; input < kInputs; ++input)
            estimates_[input].resize(Surroundings::sizes(input, columns, num_contexts));
        for (auto &weights : weights_) weights.fill(kOne * 3 / 10);
    }

    // `code(probability)` gives the decision, which is 1 with that probability of 65536.
    template <typename Code>
    int decide(const std::array<std::size_t, kInputs> &places, unsigned context, bool first, Code &&code) {
        static const Logits logits;
        std::array<Estimate *, kInputs> estimates;
        std::array<int, kInputs> inputs;
        std::array<std::int32_t, kInputs> &weights = weights_[2 * context + (first ? 1 : 0)];
        std::int64_t sum = 0;
        for (std::size_t i = 0; i < kInputs; ++i) {
            estimates[i] = &estimates_[i][places[i]];
            inputs[i] = logits.of[estimates[i]->probability >> 4];
            sum += std::int64_t{weights[i]} * inputs[i];
        }
        const int probability = probability_of(static_cast<int>(within(sum / kOne, kLogitLimit)));
        const int bit = code(probability);
        const int error = (bit ? kOne : 0) - probability;
        for (std::size_t i = 0; i < kInputs; ++i) {
            const std::int64_t weight = weights[i] + (std::int64_t{inputs[i]} * error * 3) / (1 << 20);
            weights[i] = static_cast<std::int32_t>(within(weight, 16 * kOne));
            estimates[i]->learn(bit);
        }
        return bit;
    }

  private:
    std::array<std::vector<Estimate>, kInputs> estimates_;
    std::vector<std::array<std::int32_t, kInputs>> weights_;
};

// A range of 32 bits that is halved by each decision in proportion to its probability.
struct Range {
    std::uint32_t low = 0, high = ~0u;

    std::uint32_t middle(int probability) const {
        const std::uint64_t width = high - low;
        return low + static_cast<std::uint32_t>(width * static_cast<unsigned>(probability) >> 16);
    }

    void narrow(int bit, std::uint32_t at) { bit ? high = at : low = at + 1; }
    bool settled() const { return ((low ^ high) & 0xFF000000u) == 0; }

    void shift() {
        low <<= 8;
        high = high << 8 | 0xFFu;
    }
};

class Writer {
  public:
    Writer(Output &out) : out_(out) {}

    int put(int bit, int probability) {
        range_.narrow(bit, range_.middle(probability));
        while (range_.settled()) {
            *out_.grow(1) = static_cast<std::uint8_t>(range_.low >> 24);
            range_.shift();
        }
        return bit;
    }

    void finish() {
        for (int byte = 3; byte >= 0; --byte) *out_.grow(1) = static_cast<std::uint8_t>(range_.low >> 8 * byte);
    }

  private:
    Output &out_;
    Range range_;
};

class Reader {
  public:
    Reader(const std::uint8_t *data, std::size_t size) : at_(data), end_(data + size) {
        for (int byte = 0; byte < 4; ++byte) code_ = code_ << 8 | next();
    }

    int take(int probability) {
        const std::uint32_t middle = range_.middle(probability);
        const int bit = code_ <= middle ? 1 : 0;
        range_.narrow(bit, middle);
        while (range_.settled()) {
            range_.shift();
            code_ = code_ << 8 | next();
        }
        return bit;
    }

    bool at_end() const { return at_ == end_; }

  private:
    std::uint8_t next() {
        if (at_ == end_) throw std::invalid_argument("a mixed stream of symbols ends early");
        return *at_++;
    }

    const std::uint8_t *at_, *end_;
    std::uint32_t code_ = 0;
    Range range_;
};

// Goes through the matrix; `code(probability, place, bit)` gives the decision at `place`, of which a writer knows the
// `bit` that `symbol_at` implies.
template <typename SymbolAt, typename Code>
void walk(const std::uint8_t *contexts, std::size_t count, unsigned num_contexts, std::size_t columns,
          std::uint8_t common, SymbolAt &&symbol_at, Code &&code) {
    Surroundings around(columns);
    Mixer mixer(columns, num_contexts);
    for (std::size_t i = 0; i < count; ++i) {
        const unsigned context = contexts == nullptr ? 0 : contexts[i];
        const std::array<std::size_t, kInputs> base = around.places(context);
        const int wanted = symbol_at(i);
        const auto decide = [&](unsigned node, int bit) {
            std::array<std::size_t, kInputs> places = base;
            for (std::size_t input = 0; input + 1 < kInputs; ++input) places[input] += node;
            places[kInputs - 1] = around.last_place(context, node);
            return mixer.decide(places, context, node == 0, [&](int probability) { return code(probability, bit); });
        };
        unsigned symbol = common;
        if (decide(0, wanted == common ? 0 : 1) != 0) {
            unsigned node = 1;
            for (int level = 7; level >= 0; --level)
                node = node * 2 + static_cast<unsigned>(decide(node, wanted >> level & 1));
            symbol = node - 256;
        }
        symbol_at(i, symbol);
        around.move_on(static_cast<int>(symbol) - common);
    }
}

struct Given {
    const std::uint8_t *symbols;
    int operator()(std::size_t i) const { return symbols[i]; }
    void operator()(std::size_t, unsigned) const {}
};

struct Found {
    std::uint8_t *symbols;
    int operator()(std::size_t) const { return 0; }
    void operator()(std::size_t i, unsigned symbol) const { symbols[i] = static_cast<std::uint8_t>(symbol); }
};

std::uint8_t most_common(const std::uint8_t *symbols, std::size_t count) {
    std::array<std::size_t, 256> counts{};
    for (std::size_t i = 0; i < count; ++i) ++counts[symbols[i]];
    return static_cast<std::uint8_t>(std::max_element(counts.begin(), counts.end()) - counts.begin());
}

}  // namespace

void encode_mixed(const std::uint8_t *symbols, const std::uint8_t *contexts, std::size_t count, unsigned num_contexts,
                  std::size_t columns, Output &out) {
    if (count == 0) return;
    if (columns == 0 || columns > count || columns > 0xFFFFFFFFu)
        throw std::invalid_argument("columns must be 1 to the number of symbols");
    const std::uint8_t common = most_common(symbols, count);
    *out.grow(1) = 0;
    const auto width = static_cast<std::uint32_t>(columns);
    out.add(&width, 4);
    *out.grow(1) = common;
    Writer writer(out);
    walk(contexts, count, num_contexts, columns, common, Given{symbols},
         [&](int probability, int bit) { return writer.put(bit, probability); });
    writer.finish();
}

void decode_mixed(const std::uint8_t *data, std::size_t size, const std::uint8_t *contexts, std::size_t count,
                  unsigned num_contexts, std::uint8_t *symbols) {
    if (size < kHeadBytes || data[0] != 0)
        throw std::invalid_argument("a mixed stream of symbols is shorter than its head");
    std::uint32_t columns;
    std::memcpy(&columns, data + 1, 4);
    if (columns == 0 || columns > count)
        throw std::invalid_argument("a mixed stream of symbols has an impossible number of columns");
    Reader reader(data + kHeadBytes, size - kHeadBytes);
    walk(contexts, count, num_contexts, columns, data[5], Found{symbols},
         [&](int probability, int) { return reader.take(probability); });
    if (!reader.at_end()) throw std::invalid_argument("a mixed stream of symbols is longer than its symbols need");
}

}  // namespace checkpoint
