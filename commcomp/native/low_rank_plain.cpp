#define KERNELS plain
#define LANES 4
#include "low_rank_kernels.inc"
