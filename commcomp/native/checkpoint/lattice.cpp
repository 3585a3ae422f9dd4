#include "lattice.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "instruction_sets.hpp"

namespace checkpoint {

namespace {

// Row by row what is known; constants where nothing is.
class Rows {
  public:
    Rows(const LatticeKnowledge &known)
        : known_(known), zeros_(known.predictions == nullptr ? known.columns : 0),
          ones_(known.references == nullptr ? known.columns : 0, 1.0f) {
        const double units = std::nearbyint(static_cast<double>(known.step) * (1 << 23));
        units_ = static_cast<std::int32_t>(std::min(std::max(units, 1.0), 2147483647.0));
    }

    LatticeRow operator[](std::size_t row) const {
        const std::size_t start = row * known_.columns;
        return {known_.predictions == nullptr ? zeros_.data() : known_.predictions + start,
                known_.references == nullptr ? ones_.data() : known_.references + start, known_.step, units_,
                known_.columns};
    }

  private:
    const LatticeKnowledge &known_;
    std::vector<float> zeros_, ones_;
    std::int32_t units_;
};

const LatticeKernels &kernels_of(const LatticeKnowledge &known) {
    return known.octaves ? lattice_kernels().octaves : lattice_kernels().linear;
}

}  // namespace

void cut_on_lattice(const float *values, const LatticeKnowledge &known, std::uint8_t *symbols, float *reconstruction) {
    const LatticeKernels &kernels = kernels_of(known);
    const Rows rows(known);
    for (std::size_t row = 0; row < known.rows; ++row) {
        const std::size_t start = row * known.columns;
        kernels.cut(values + start, rows[row], symbols + start, reconstruction + start);
    }
}

void join_on_lattice(const std::uint8_t *symbols, const LatticeKnowledge &known, float *values) {
    const LatticeKernels &kernels = kernels_of(known);
    const Rows rows(known);
    for (std::size_t row = 0; row < known.rows; ++row)
        kernels.join(symbols + row * known.columns, rows[row], values + row * known.columns);
}

void lattice_contexts(const std::int32_t *row_spread, const std::int32_t *column_spread, std::int32_t base,
                      std::size_t rows, std::size_t columns, std::uint8_t *contexts) {
    for (std::size_t row = 0; row < rows; ++row)
        lattice_kernels().contexts(row_spread[row] - base, column_spread, columns, contexts + row * columns);
}

}  // namespace checkpoint
