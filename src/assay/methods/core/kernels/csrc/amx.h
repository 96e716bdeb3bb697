// The tile registers of AMX: whether this process may use them, and their configuration while a thread does.
//
// oneDNN and ATen use the same registers in the same threads: a thread sets them up when it begins and gives them up when it ends.

#pragma once

#include <cstdint>

#if defined(__linux__) && defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define ASSAY_AMX 1
#endif

namespace {

#ifdef ASSAY_AMX
// Linux lends them to a process that asks. It refuses, for example, where a signal stack could not hold them.
inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}

// A thread's eight tiles of 16 rows of 64 bytes, for as long as this lives; not touched unless wanted.
struct Tiles {
  const bool on;
  explicit Tiles(bool wanted) : on(wanted && tiles_allowed()) {
    static constexpr struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    if (on) _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (on) _tile_release();
  }
  Tiles(const Tiles&) = delete;
};
#else
inline bool tiles_allowed() { return false; }
struct Tiles {
  static constexpr bool on = false;
  explicit Tiles(bool) {}
};
#endif

}  // namespace
