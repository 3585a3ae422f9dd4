// The tables of kernels that this build has, one an instruction set, and which of them is in use.
#pragma once

#include <string>
#include <vector>

#include "block_codec.hpp"
#include "low_rank_kernels.hpp"
#include "nearest.hpp"
#include "sparse_codec.hpp"

struct InstructionSet {
    std::string name;
    const LowRankKernels *low_rank;
    const BlockKernels *blocks;
    const SparseKernels *sparse;
    const NearestKernels *nearest;
};

// The one in use: the fastest from the start.
const InstructionSet &instruction_set();

// What this machine can run, the fastest last.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that is not usable here.
void use(const std::string &name);
