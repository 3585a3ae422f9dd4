// How this thread's processor treats denormal numbers: decoders need them as IEEE 754 has them.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace checkpoint {

// The thread's control register; restored by `set_float_mode`.
inline std::uint64_t float_mode() {
#if defined(__x86_64__) || defined(_M_X64)
    return _mm_getcsr();
#elif defined(__aarch64__)
    std::uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
#else
    return 0;
#endif
}

inline void set_float_mode(std::uint64_t mode) {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
    (void)mode;
#endif
}

// The mode before; afterwards denormals are kept and results rounded to nearest.
inline std::uint64_t use_ieee_floats() {
    const std::uint64_t before = float_mode();
#if defined(__x86_64__) || defined(_M_X64)
    set_float_mode(before & ~std::uint64_t{0xE040});  // flush to zero, rounding, denormals are zeros
#elif defined(__aarch64__)
    set_float_mode(before & ~(std::uint64_t{7} << 22));  // rounding, flush to zero
#endif
    return before;
}

}  // namespace checkpoint
