// The processor's intrinsics. To be included last: it silences a warning in what follows.
#pragma once

#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
