// AMX's tile registers in memory, for machines that have AVX512-BF16 but no AMX, and for sanitizers, which do
// not see what a tile instruction reads: -DNCFAST_EMULATE_AMX, `make emulate`. Slow. To be included last;
// from there on the intrinsics mean these.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/intrinsics.h"

namespace ncfast {

struct EmulatedTiles {
  struct alignas(64) Tile {
    char line[16][64];
  };
  Tile tile[8];
  bool configured = false;

  Tile& at(int number) {
    if (!configured) std::abort();  // as the processor would
    return tile[number];
  }

  void load_configuration(const void*) { configured = true; }  // there is one: kTileConfiguration
  void release() { configured = false; }
  void zero(int number) { at(number) = {}; }

  void load(int number, const void* from, int64_t stride) {
    Tile& to = at(number);
    for (int i = 0; i < 16; i++) std::memcpy(to.line[i], static_cast<const char*>(from) + i * stride, 64);
  }

  void store(int number, void* to, int64_t stride) {
    const Tile& from = at(number);
    for (int i = 0; i < 16; i++) std::memcpy(static_cast<char*>(to) + i * stride, from.line[i], 64);
  }

  // One half of each word as float32; denormals are zeros.
  [[gnu::target("avx512f")]] static __m512 half(__m512i words, bool odd) {
    const __m512i bits =
        odd ? _mm512_and_si512(words, _mm512_set1_epi32(-65536)) : _mm512_slli_epi32(words, 16);
    const __mmask16 normal = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(normal, bits));
  }

  // sum[i][j] += <left[i], right[j]>: the even and the odd columns in a chain of FMAs each, then the two.
  [[gnu::target("avx512f")]] void multiply_bfloat16(int sum, int left, int right) {
    for (int i = 0; i < 16; i++) {
      __m512 even = _mm512_setzero_ps(), odd = even;
      for (int k = 0; k < 16; k++) {
        int32_t word;
        std::memcpy(&word, at(left).line[i] + k * 4, sizeof word);
        const __m512i one = _mm512_set1_epi32(word), other = _mm512_load_si512(at(right).line[k]);
        even = _mm512_fmadd_ps(half(one, false), half(other, false), even);
        odd = _mm512_fmadd_ps(half(one, true), half(other, true), odd);
      }
      char* line = at(sum).line[i];
      _mm512_store_ps(line, _mm512_add_ps(_mm512_load_ps(line), _mm512_add_ps(even, odd)));
    }
  }

  // The same of signed 8-bit integers, exactly.
  void multiply_integers(int sum, int left, int right) {
    const auto byte = [](const char* line, int k) {
      return static_cast<int32_t>(static_cast<int8_t>(line[k]));
    };
    for (int i = 0; i < 16; i++) {
      int32_t total[16];
      std::memcpy(total, at(sum).line[i], sizeof total);
      for (int k = 0; k < 64; k++) {
        for (int j = 0; j < 16; j++)
          total[j] += byte(at(left).line[i], k) * byte(at(right).line[k / 4], j * 4 + k % 4);
      }
      std::memcpy(at(sum).line[i], total, sizeof total);
    }
  }
};

inline thread_local EmulatedTiles emulated_tiles;

}  // namespace ncfast

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig ncfast::emulated_tiles.load_configuration
#define _tile_release ncfast::emulated_tiles.release
#define _tile_zero ncfast::emulated_tiles.zero
#define _tile_loadd ncfast::emulated_tiles.load
#define _tile_stored ncfast::emulated_tiles.store
#define _tile_dpbf16ps ncfast::emulated_tiles.multiply_bfloat16
#define _tile_dpbssd ncfast::emulated_tiles.multiply_integers
