#include "instruction_sets.hpp"

#include <atomic>
#include <stdexcept>

namespace checkpoint {

namespace {

struct InstructionSet {
    std::string name;
    const FloatKernelTable *floats;
    const LatticeKernelTable *lattices;
};

std::vector<InstructionSet> usable_sets() {
    std::vector<InstructionSet> sets{{"plain", &plain::float_kernels, &plain::lattice_kernels}};
#if defined(COMMCOMP_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) sets.push_back({"avx2", &avx2::float_kernels, &avx2::lattice_kernels});
#endif
    return sets;
}

const std::vector<InstructionSet> &sets() {
    static const std::vector<InstructionSet> usable = usable_sets();
    return usable;
}

std::atomic<const InstructionSet *> chosen{nullptr};

const InstructionSet &in_use() {
    const InstructionSet *set = chosen.load();
    return set == nullptr ? sets().back() : *set;
}

}  // namespace

const FloatKernels &float_kernels(Format format, Cut cut) {
    return (*in_use().floats)[static_cast<std::size_t>(format)][static_cast<std::size_t>(cut)];
}

const LatticeKernelTable &lattice_kernels() { return *in_use().lattices; }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet &set : sets()) names.push_back(set.name);
    return names;
}

void use(const std::string &name) {
    for (const InstructionSet &set : sets())
        if (set.name == name) {
            chosen = &set;
            return;
        }
    throw std::invalid_argument("instruction set '" + name + "' is not usable on this machine");
}

}  // namespace checkpoint
