#include "instruction_sets.hpp"

#include <atomic>
#include <stdexcept>

namespace {

std::vector<InstructionSet> usable_sets() {
    std::vector<InstructionSet> sets{
        {"plain", &low_rank::plain, &block_codec::plain, &sparse_codec::plain, &nearest::plain}};
#if defined(COMMCOMP_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        sets.push_back({"avx2", &low_rank::avx2, &block_codec::avx2, &sparse_codec::avx2, &nearest::avx2});
        if (__builtin_cpu_supports("avx512f"))
            sets.push_back({"avx512", &low_rank::avx512, &block_codec::avx2, &sparse_codec::avx2, &nearest::avx2});
    }
#endif
    return sets;
}

const std::vector<InstructionSet> kSets = usable_sets();
std::atomic<const InstructionSet *> in_use{&kSets.back()};

}  // namespace

const InstructionSet &instruction_set() { return *in_use.load(); }

void use(const std::string &name) {
    for (const InstructionSet &set : kSets)
        if (set.name == name) {
            in_use = &set;
            return;
        }
    throw std::invalid_argument("instruction set '" + name + "' is not usable on this machine");
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet &set : kSets) names.push_back(set.name);
    return names;
}
