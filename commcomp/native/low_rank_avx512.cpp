#define KERNELS avx512
#define LANES 16
#include "low_rank_kernels.inc"
