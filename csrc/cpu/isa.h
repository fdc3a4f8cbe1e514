// Which instruction sets this processor and this system really offer, and which one an operation runs on.
#pragma once

#include <string>
#include <vector>

namespace ncfast {

enum class Isa { portable, avx2, avx512, avx512_vnni, avx512_bf16, amx };  // from the plainest to the fastest

constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16, Isa::amx};

const char* name(Isa isa);

// True when the processor has every feature the bodies of `isa` are compiled for, the operating system saves
// their registers and, for AMX, has granted this process their use.
bool available(Isa isa);

// The fastest available instruction set of those an operation has bodies for. NCFAST_CPU_ISA forces one, or
// where the operation has no body for it the fastest of those it includes: std::invalid_argument if there is
// none of that name, std::runtime_error if it cannot run here.
Isa select(const std::vector<Isa>& bodies);

}  // namespace ncfast
