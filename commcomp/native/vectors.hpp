// Vectors of LANES floats in GCC's and Clang's generic form: the -m flags of a file decide what becomes of them.
#pragma once

#include <cstddef>
#include <cstring>
#include <utility>

namespace {

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

[[maybe_unused]] inline Vector load(const float *at) {
    Vector value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

[[maybe_unused]] inline void store(float *at, Vector value) { std::memcpy(at, &value, sizeof value); }

[[maybe_unused]] inline Vector all(float value) { return value - Vector{}; }

}  // namespace
