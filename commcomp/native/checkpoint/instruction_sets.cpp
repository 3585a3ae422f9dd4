#include <atomic>
#include <stdexcept>

#include "float_kernels.hpp"

namespace checkpoint {

namespace {

struct InstructionSet {
    std::string name;
    const FloatKernelTable *kernels;
};

std::vector<InstructionSet> usable_sets() {
    std::vector<InstructionSet> sets{{"plain", &plain::float_kernels}};
#if defined(COMMCOMP_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) sets.push_back({"avx2", &avx2::float_kernels});
#endif
    return sets;
}

const std::vector<InstructionSet> &sets() {
    static const std::vector<InstructionSet> usable = usable_sets();
    return usable;
}

std::atomic<const FloatKernelTable *> in_use{nullptr};

}  // namespace

const FloatKernels &float_kernels(Format format, Cut cut) {
    const FloatKernelTable *table = in_use.load();
    if (table == nullptr) table = sets().back().kernels;
    return (*table)[static_cast<std::size_t>(format)][static_cast<std::size_t>(cut)];
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet &set : sets()) names.push_back(set.name);
    return names;
}

void use(const std::string &name) {
    for (const InstructionSet &set : sets())
        if (set.name == name) {
            in_use = set.kernels;
            return;
        }
    throw std::invalid_argument("instruction set '" + name + "' is not usable on this machine");
}

}  // namespace checkpoint
