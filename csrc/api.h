// The C interface that Python calls through ctypes: plain numbers and pointers, no exceptions, no Python, no torch.
//
// Pointers named x, y, rows are the caller's and only used during the call. Handles (pool, arena, packed) are made by a
// _create or _pack call and end with the matching _release. Status: 0 = done, negative = see each function.
#pragma once

#include <stdint.h>

#define SEPTET_API extern "C" __attribute__((visibility("default")))

// Raised with every change of a signature: library.py refuses a library of another version.
#define SEPTET_ABI 1
