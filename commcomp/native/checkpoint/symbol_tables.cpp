#include "symbol_tables.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace checkpoint {

namespace {

constexpr std::uint64_t kFewSymbols = 1024;

std::uint64_t total_of(const Counts &counts) { return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0}); }

unsigned gamma_bits(std::uint32_t value) { return 2 * (31 - static_cast<unsigned>(__builtin_clz(value))) + 1; }

struct Range {
    unsigned first = 0, last = 0;
};

template <typename Values>
Range range_of(const Values &values) {
    Range range;
    while (range.first < 255 && values[range.first] == 0) ++range.first;
    range.last = 255;
    while (range.last > range.first && values[range.last] == 0) --range.last;
    return range;
}

double table_bits(const Frequencies &table) {
    const Range range = range_of(table.of);
    double bits = 16;
    for (unsigned symbol = range.first; symbol < range.last; ++symbol) bits += gamma_bits(table.of[symbol] + 1u);
    return bits;
}

double symbol_bits(const Counts &counts, const Frequencies &table) {
    double bits = 0;
    for (unsigned symbol = 0; symbol < 256; ++symbol)
        if (counts[symbol] > 0) bits += counts[symbol] * (kScaleBits - std::log2(static_cast<double>(table.of[symbol])));
    return bits;
}

}  // namespace

Frequencies normalise(const Counts &counts) {
    const std::uint64_t total = total_of(counts);
    Frequencies table;
    if (total == 0) return table;
    std::int64_t left = kScale;
    for (unsigned symbol = 0; symbol < 256; ++symbol) {
        if (counts[symbol] == 0) continue;
        const std::uint64_t share = (counts[symbol] * std::uint64_t{kScale} + total / 2) / total;
        table.of[symbol] = static_cast<std::uint16_t>(std::max<std::uint64_t>(share, 1));
        left -= table.of[symbol];
    }
    // What rounding left over goes to, or comes from, the largest, where it matters least.
    while (left != 0) {
        const auto largest = std::max_element(table.of.begin(), table.of.end());
        const std::int64_t change = left > 0 ? left : -std::min<std::int64_t>(-left, std::max(*largest / 8, 1));
        *largest = static_cast<std::uint16_t>(*largest + change);
        left -= change;
    }
    return table;
}

double cost_with_table(const Counts &counts) {
    if (total_of(counts) == 0) return 0;
    const Frequencies table = normalise(counts);
    return symbol_bits(counts, table) + table_bits(table);
}

void write_table(const Frequencies &table, BitWriter &out) {
    const Range range = range_of(table.of);
    out.reserve(16 + 32 * 256);
    out.put(range.first, 8);
    out.put(range.last, 8);
    // The last one is what is left.
    for (unsigned symbol = range.first; symbol < range.last; ++symbol) out.put_gamma(table.of[symbol] + 1u);
}

Frequencies read_table(BitReader &in) {
    Frequencies table;
    const unsigned first = static_cast<unsigned>(in.take(8)), last = static_cast<unsigned>(in.take(8));
    if (last < first) throw std::invalid_argument("a table of symbols ends before it begins");
    std::uint32_t left = kScale;
    for (unsigned symbol = first; symbol < last; ++symbol) {
        const std::uint32_t frequency = in.take_gamma() - 1;
        if (frequency >= left) throw std::invalid_argument("the frequencies of a table add up to too much");
        table.of[symbol] = static_cast<std::uint16_t>(frequency);
        left -= frequency;
    }
    table.of[last] = static_cast<std::uint16_t>(left);
    return table;
}

TablePlan plan_tables(const std::vector<Counts> &counts) {
    TablePlan plan;
    plan.table_of.assign(counts.size(), 0);
    struct Cluster {
        Counts counts;
        double bits;
        std::vector<unsigned> contexts;
    };
    std::uint64_t total = 0;
    for (const Counts &of_context : counts) total += total_of(of_context);
    if (total < kFewSymbols && counts.size() > 1) {  // a second table would hardly pay for itself, let alone for its search
        Counts all{};
        for (const Counts &of_context : counts)
            for (unsigned symbol = 0; symbol < 256; ++symbol) all[symbol] += of_context[symbol];
        plan.tables.push_back(normalise(all));
        return plan;
    }
    std::vector<Cluster> clusters;
    for (unsigned context = 0; context < counts.size(); ++context)
        if (total_of(counts[context]) > 0)
            clusters.push_back({counts[context], cost_with_table(counts[context]), {context}});
    const auto merged = [](const Cluster &a, const Cluster &b) {
        Counts sum = a.counts;
        for (unsigned symbol = 0; symbol < 256; ++symbol) sum[symbol] += b.counts[symbol];
        return sum;
    };
    // Gains of merging each cluster with the next one; only those beside a merged one change.
    std::vector<double> gains;
    const auto gain = [&](std::size_t left) {
        const double together = cost_with_table(merged(clusters[left], clusters[left + 1]));
        return clusters[left].bits + clusters[left + 1].bits - together;
    };
    for (std::size_t left = 0; left + 1 < clusters.size(); ++left) gains.push_back(gain(left));
    while (!gains.empty()) {
        const std::size_t best = static_cast<std::size_t>(std::max_element(gains.begin(), gains.end()) - gains.begin());
        if (gains[best] <= 0) break;
        Cluster &into = clusters[best];
        const Cluster &from = clusters[best + 1];
        into.bits = into.bits + from.bits - gains[best];
        into.counts = merged(into, from);
        into.contexts.insert(into.contexts.end(), from.contexts.begin(), from.contexts.end());
        clusters.erase(clusters.begin() + static_cast<std::ptrdiff_t>(best) + 1);
        gains.erase(gains.begin() + static_cast<std::ptrdiff_t>(best));
        if (best < gains.size()) gains[best] = gain(best);
        if (best > 0) gains[best - 1] = gain(best - 1);
    }
    for (const Cluster &cluster : clusters) {
        for (const unsigned context : cluster.contexts)
            plan.table_of[context] = static_cast<std::uint8_t>(plan.tables.size());
        plan.tables.push_back(normalise(cluster.counts));
    }
    return plan;
}

}  // namespace checkpoint
