// The numbers of the formats: core/quantize/formats.py is where they come from, and a test compares the two.
#pragma once
#include <cstdint>

enum Format : std::int64_t {
  kFp32 = 0,
  kBf16 = 1,
  kInt8 = 2,
  kInt4 = 3,
  kTernary = 4,
  kBase3 = 5,
  kBinary = 6,
  kW8a8 = 7,
};
