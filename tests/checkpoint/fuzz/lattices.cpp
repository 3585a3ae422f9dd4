// A libFuzzer target: matrices of any floats on a lattice. All instruction sets must cut alike, and join what is not kept
// as it is to what the encoder said.
#include <cmath>
#include <string>

#include "input.hpp"
#include "instruction_sets.hpp"
#include "lattice.hpp"

using namespace checkpoint;

namespace {

using Floats = std::vector<float>;

struct Task {
    LatticeKnowledge known;
    Floats predictions, references, values;
    std::vector<std::int32_t> spread;
};

Task read(fuzz::Input in) {
    Task task{};
    const unsigned flags = in.take<std::uint8_t>();
    const std::size_t rows = in.take<std::uint8_t>() % 4 + 1, columns = in.take<std::uint8_t>() + std::size_t{1};
    float step = std::fabs(in.take<float>());
    if (!(step > 0 && step < INFINITY)) step = 1;
    task.known = {(flags & 1) != 0, nullptr, nullptr, step, rows, columns};
    const auto matrix = [&] {
        const std::size_t period = in.take<std::uint8_t>() % 16 + 1;
        return in.take_repeated<float>(period, rows * columns);
    };
    task.values = matrix();
    if (flags & 2) task.predictions = matrix();
    if (flags & 4) task.references = matrix();
    for (const std::int16_t one : in.take_repeated<std::int16_t>(4, rows + columns)) task.spread.push_back(one);
    return task;
}

struct Found {
    fuzz::Bytes symbols, contexts;
    Floats reconstruction, joined;
};

Found run(const Task &task) {
    LatticeKnowledge known = task.known;
    if (!task.predictions.empty()) known.predictions = task.predictions.data();
    if (!task.references.empty()) known.references = task.references.data();
    const std::size_t count = task.values.size();
    Found found{fuzz::Bytes(count), fuzz::Bytes(count), Floats(count), Floats(count)};
    cut_on_lattice(task.values.data(), known, found.symbols.data(), found.reconstruction.data());
    join_on_lattice(found.symbols.data(), known, found.joined.data());
    lattice_contexts(task.spread.data(), task.spread.data() + known.rows, 7, known.rows, known.columns,
                     found.contexts.data());
    return found;
}

bool same_bits(const float &one, const float &other) { return std::memcmp(&one, &other, sizeof one) == 0; }

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    const Task task = read(fuzz::Input(data, size));
    use("plain");
    const Found plain = run(task);
    for (const std::string &name : instruction_sets()) {
        use(name);
        const Found found = run(task);
        fuzz::require(found.symbols == plain.symbols && found.contexts == plain.contexts,
                      "an instruction set gives other symbols");
        for (std::size_t i = 0; i < task.values.size(); ++i) {
            fuzz::require(same_bits(found.reconstruction[i], plain.reconstruction[i]), "a value comes back otherwise");
            if (found.symbols[i] == 255) continue;
            fuzz::require(same_bits(found.joined[i], found.reconstruction[i]), "a decoder joins otherwise");
        }
    }
    return 0;
}
