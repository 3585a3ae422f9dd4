// The tables of kernels that this build has, one an instruction set, and which of them is in use.
#pragma once

#include <string>
#include <vector>

#include "float_kernels.hpp"
#include "lattice_kernels.hpp"

namespace checkpoint {

// Those in use: the fastest that this machine can run, from the start.
const FloatKernels &float_kernels(Format format, Cut cut);
const LatticeKernelTable &lattice_kernels();

// What this machine can run, the fastest last.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that is not usable here.
void use(const std::string &name);

}  // namespace checkpoint
