// The four passes of a low-rank step over a batch of k matrices M = G + scale E, each touching memory once.
//
// G (gradient), n x m and contiguous, lies `stride` floats from the next; E (residual) likewise. Factors are
// contiguous: left is [k, r, n], right is [k, r, m]. Results do not depend on how rows or columns are cut.
#pragma once

#include <cstddef>

struct LowRankBatch {
    float *gradient;
    std::ptrdiff_t gradient_stride;
    float *residual;
    std::ptrdiff_t residual_stride;
    std::ptrdiff_t matrices, rows, columns, rank;
};

// One instruction set's passes over matrix `index` of a batch. The first and the last two work on rows
// [begin, end), the second on columns [begin, end), so that threads can share a matrix.
struct LowRankKernels {
    // out = right M^T, [r, n]: P = M Q. Nothing is written but `out`.
    void (*left_factor)(const LowRankBatch &, std::ptrdiff_t index, const float *right, float scale, float *out,
                        std::ptrdiff_t begin, std::ptrdiff_t end);
    // out = left M, [r, m]: Q = M^T P. With `form` E becomes M.
    void (*right_factor)(const LowRankBatch &, std::ptrdiff_t index, const float *left, float scale, bool form,
                         float *out, std::ptrdiff_t begin, std::ptrdiff_t end);
    // E -= left^T right.
    void (*subtract)(const LowRankBatch &, std::ptrdiff_t index, const float *left, const float *right,
                     std::ptrdiff_t begin, std::ptrdiff_t end);
    // G = left^T right.
    void (*reconstruct)(const LowRankBatch &, std::ptrdiff_t index, const float *left, const float *right,
                        std::ptrdiff_t begin, std::ptrdiff_t end);
};

// One table an instruction set; those that this build has.
namespace low_rank {
extern const LowRankKernels plain;
#if defined(COMMCOMP_X86)
extern const LowRankKernels avx2;
extern const LowRankKernels avx512;
#endif
}  // namespace low_rank
