// What the AMX bodies share, and with that of AVX512-BF16 how to transpose. To be included last, as
// intrinsics.h.
#pragma once

#include <cstdint>

#include "cpu/intrinsics.h"

namespace ncfast {

// Eight tile registers of 16 lines of 64 bytes, for _tile_loadconfig. No local variable: to GCC 12 that reads
// 8 of these bytes, and it need not store the others.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfiguration kTileConfiguration;

// To be called between storing something and loading tiles from it: to GCC 12, _tile_loadd does not read
// memory.
inline void settle_stores() { asm volatile("" ::: "memory"); }

// Stores the transpose of 16 x 16 words: pairs, then quadruples of lines are interleaved within the 128-bit
// lanes, then the lanes are exchanged.
[[gnu::target("avx512f")]] inline void store_transposed(const __m512i line[16], char* out) {
  __m512i pairs[16], lanes[16];
  for (int i = 0; i < 16; i += 4) {
    pairs[i] = _mm512_unpacklo_epi32(line[i], line[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(line[i], line[i + 1]);
    pairs[i + 2] = _mm512_unpacklo_epi32(line[i + 2], line[i + 3]);
    pairs[i + 3] = _mm512_unpackhi_epi32(line[i + 2], line[i + 3]);
  }
  // lanes[4 m + n]: lane l holds column 4 l + n of lines 4 m to 4 m + 3.
  for (int i = 0; i < 16; i += 4) {
    lanes[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    lanes[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    lanes[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    lanes[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int n = 0; n < 4; n++) {
    const __m512i even_low = _mm512_shuffle_i32x4(lanes[n], lanes[4 + n], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(lanes[n], lanes[4 + n], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(lanes[8 + n], lanes[12 + n], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(lanes[8 + n], lanes[12 + n], 0xdd);
    _mm512_store_si512(out + n * 64, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_store_si512(out + (4 + n) * 64, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_store_si512(out + (8 + n) * 64, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_store_si512(out + (12 + n) * 64, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

}  // namespace ncfast

#if defined(NCFAST_EMULATE_AMX)
#include "cpu/tiles_emulated.h"
#endif
