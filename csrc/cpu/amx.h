// What the AMX bodies share. To be included last: it silences a warning in what follows.
#pragma once

#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace ncfast {

// Eight tile registers of 16 lines of 64 bytes, for _tile_loadconfig.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace ncfast
