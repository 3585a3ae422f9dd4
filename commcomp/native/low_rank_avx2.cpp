#define KERNELS avx2
#define LANES 8
#include "low_rank_kernels.inc"
