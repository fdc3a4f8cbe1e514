#include "cpu/isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ncfast {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves zeros when the leaf does not exist
  return r;
}

bool has(unsigned word, std::initializer_list<int> bits) {
  return std::all_of(bits.begin(), bits.end(), [word](int bit) { return word >> bit & 1; });
}

// XCR0: the register states the operating system saves. Reading it needs OSXSAVE.
uint64_t saved_states() {
  if (!has(cpuid(1, 0).c, {27})) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Tile registers are so large that Linux hands them out only to processes that ask.
bool tiles_granted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// What `isa` needs beyond the sets before it.
bool detect(Isa isa) {
  constexpr uint64_t kAvx = 0x6, kAvx512 = 0xe6, kTiles = 0x60000;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  const uint64_t saved = saved_states();
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:  // FMA, AVX, F16C; AVX2
      return has(one.c, {12, 28, 29}) && has(seven.b, {5}) && (saved & kAvx) == kAvx;
    case Isa::avx512:  // F, DQ, BW, VL
      return has(seven.b, {16, 17, 30, 31}) && (saved & kAvx512) == kAvx512;
    case Isa::avx512_vnni:
      return has(seven.c, {11});
    case Isa::avx512_bf16:
      return has(cpuid(7, 1).a, {5});
    case Isa::amx:  // AMX-BF16, AMX-TILE, AMX-INT8
#if defined(NCFAST_EMULATE_AMX)
      return true;
#endif
      return has(seven.d, {22, 24, 25}) && (saved & kTiles) == kTiles && tiles_granted();
  }
  return false;
}

#else

bool detect(Isa isa) { return isa == Isa::portable; }

#endif

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
  }
  return "";
}

bool available(Isa isa) {
  static const Isa best = [] {  // each set includes those before it
    Isa reached = Isa::portable;
    for (Isa candidate : kIsas) {
      if (!detect(candidate)) break;
      reached = candidate;
    }
    return reached;
  }();
  return isa <= best;
}

Isa select(const std::vector<Isa>& bodies) {
  Isa most = *std::rbegin(kIsas);
  const char* forced = std::getenv("NCFAST_CPU_ISA");
  if (forced && *forced) {
    const auto isa = std::find_if(std::begin(kIsas), std::end(kIsas),
                                  [forced](Isa candidate) { return std::string(forced) == name(candidate); });
    if (isa == std::end(kIsas)) {
      throw std::invalid_argument(std::string("NCFAST_CPU_ISA: unknown instruction set '") + forced +
                                  "'; choose one of amx, avx512_bf16, avx512_vnni, avx512, avx2, portable");
    }
    if (!available(*isa)) {
      throw std::runtime_error(std::string("NCFAST_CPU_ISA=") + forced + ": this machine does not offer it");
    }
    most = *isa;
  }
  Isa best = Isa::portable;
  for (Isa isa : bodies) {
    if (isa <= most && available(isa)) best = std::max(best, isa);
  }
  return best;
}

}  // namespace ncfast
