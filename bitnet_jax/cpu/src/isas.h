// All instruction sets that the compiler knows of this kind of machine, with their kernels.
#pragma once

#include <string_view>

#include "floats.h"
#include "isa.h"
#include "ternary.h"
#include "floats_isas.inc"
#include "ternary_scalar.inc"
#if defined(__x86_64__)
#include "ternary_x86.inc"
#elif defined(__aarch64__)
#include "ternary_neon.inc"
#endif

namespace bitnet {

// From the plainest to the fastest.
static const Isa kIsas[] = {
    {"scalar", Always, &scalar::kTernary, &portable::kFloats},
#if defined(__x86_64__)
    {"avx2", HasAvx2, &avx2::pairs::kTernary, &avx2::kFloats},
#ifdef BITNET_AVX_VNNI
    {"avx_vnni", HasAvxVnni, &avx_vnni::kTernary, &avx2::kFloats},
#endif
    {"avx512", HasAvx512, &avx512::pairs::kTernary, &avx2::kFloats},
    {"avx512_vnni", HasAvx512Vnni, &avx512_vnni::kTernary, &avx2::kFloats},
    {"avx512_vbmi", HasAvx512Vbmi, &avx512_vbmi::kTernary, &avx2::kFloats},
#elif defined(__aarch64__)
    {"neon_dotprod", HasDotprod, &neon::dotprod::kTernary, &portable::kFloats},
#ifdef BITNET_I8MM
    {"neon_i8mm", HasI8mm, &neon_i8mm::kTernary, &portable::kFloats},
#endif
#endif
};

// The instruction set of that name if the machine has it; the best one for "".
inline const Isa* Find(std::string_view name) {
  const Isa* found = nullptr;
  for (const Isa& isa : kIsas) {
    if (isa.present() && (name.empty() || name == isa.name)) found = &isa;
  }
  return found;
}

inline const Isa* Best() {
  static const Isa* best = Find("");
  return best;
}

}  // namespace bitnet
