// The part of commcomp._native that codes blocks and sparse rows; commcomp/compressors/native_codecs.py checks what lies
// at the addresses.
#pragma once

#include <nanobind/nanobind.h>

void bind_codecs(nanobind::module_ &module);
