// Instruction sets: which there are, which this machine has, and what one set's kernels look like from outside.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#ifdef BITNET_EMULATE  // tests of AVX-512 code on machines without it
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#undef _mm512_madd_epi16  // which SIMDe 0.7 gives the arguments of another function
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#else
#include <cpuid.h>
#include <immintrin.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

// Functions between BITNET_TARGET("...") and BITNET_TARGET_END are compiled for those instructions, the rest for any machine of the kind.
#define BITNET_PRAGMA(text) _Pragma(#text)
#if defined(BITNET_EMULATE)
#define BITNET_TARGET(set)
#define BITNET_TARGET_END
#elif defined(__clang__)
#define BITNET_TARGET(set) BITNET_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define BITNET_TARGET_END _Pragma("clang attribute pop")
#else
#define BITNET_TARGET(set) _Pragma("GCC push_options") BITNET_PRAGMA(GCC target(set))
#define BITNET_TARGET_END _Pragma("GCC pop_options")
#endif

namespace bitnet {

enum class Encoding { kTwoBit = 0, kBase3 = 1 };

inline int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Kernels read packed rows in steps of this many bytes; what lies behind a row meets activations of zero.
constexpr int64_t kRowStep = 64;

// Packed bytes are asked for from memory so many bytes before they are needed: measured on one machine, where half and one and a half times
// as many cost a few percent.
constexpr int64_t kAhead = 2048;

// Tokens that a kernel multiplies at once.
constexpr int kGroup = 4;

// Rows of which the sums of one token lie beside each other.
constexpr int64_t kTaskRows = 32;

// Ternary kernels of one instruction set, on vectors of `width` bytes. Vector j of a packed row has P vectors of codes, j * P + p of plane
// p. Activations come in groups of up to kGroup tokens: vector v of the group's first token, of its second, and so on, then vector v + 1
// (see Arrange in ternary.h). Sums are of codes 0..2, modulo 2^32.
struct TernaryKernels {
  int64_t width, panel;  // bytes; rows of a panel
  int64_t limit;         // vectors of codes that `tile` may sum, 0 for any number
  // acc[i * ld_acc + r] = sum over row r of codes * x_i, for a group of m tokens and `rows` packed rows that lie row_bytes apart
  // and can be read up to `padded` bytes.
  void (*rows[2])(const int8_t* x, int m, const uint8_t* codes, int64_t row_bytes, int64_t padded, int64_t rows, uint32_t* acc,
                  int64_t ld_acc);
  // Puts the codes of `bytes` packed bytes of a panel's row into the panel, panel * width bytes of all its rows after another, in the order
  // in which `tile` reads them. What lies `ahead` bytes behind is asked for from memory.
  void (*unpack[2])(const uint8_t* packed, int64_t bytes, int64_t ahead, int64_t row, uint8_t* panel);
  // acc[i * kTaskRows + r] += sum over `steps` packed vectors of w_r * x_i, for a group of m tokens and the rows of unpacked panels.
  void (*tile[2])(const int8_t* x, int m, const uint8_t* w, int64_t panels, int64_t steps, uint32_t* acc);
};

enum class Type { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// |logit - rough logit| <= norm * error + rest * scale + floor, where size * scale and that are far below overflow.
struct RoughBound {
  double step, norm, rest, floor, size;
};

// Floating-point kernels. A sum over n has 32 lanes, element j in lane j % 32, each summed in order, and lane l is then added to
// lane l + 16, l + 8, ..., l + 1: the same bits on every instruction set. No multiplication is fused with an addition; products of two
// bfloat16 numbers, or of one and an int8, are exact anyway.
struct FloatKernels {
  // out[i * ld_out + r] = sum over n of x_i * row_r, for m <= 4 rows x of float32, by type of the other rows.
  void (*dots[3])(const float* x, int64_t ld_x, int m, const void* rows, int64_t ld_rows, int64_t count, int64_t n, float* out,
                  int64_t ld_out);
  // out[i * n + j] += sum over s, in order, of weights[i * ld_weights + s] * rows[s][j], for m vectors of weights.
  void (*combine[3])(const float* weights, int64_t ld_weights, int m, const void* rows, int64_t ld_rows, int64_t count, int64_t n, float* out);
  // values = exp(values - their largest); returns the sum.
  float (*exponentials)(float* values, int64_t n);
  // codes = the int8 codes of one row after y = x * 1 / sqrt(mean(x^2) + eps) * gain, each product rounded to bfloat16 where `round`;
  // x is overwritten. Returns the step between codes.
  float (*norm_quantize)(float* x, const float* gain, int64_t n, float eps, bool round, int8_t* codes);
  // x = relu(gate)^2 * up, each product rounded to bfloat16 where `round`.
  void (*relu2)(const float* gate, const float* up, int64_t n, bool round, float* x);
  // out[i * ld_out + r] = sum over n of x_i * row_r in integers, for m <= 4 vectors x with 127 * |x|_1 < 2^31.
  void (*whole_dots)(const int16_t* x, int64_t ld_x, int m, const int8_t* rows, int64_t count, int64_t n, int32_t* out, int64_t ld_out);
  // Of rough logits sums[r] * scale[r] * x.step, at most a bound of x and their row off: how large they can be (high), the largest of high,
  // and the largest of how small they can be. See TopLogits in floats.h.
  void (*bounds)(const int32_t* sums, const float* scale, const float* error, int64_t count, const RoughBound& x, float* high,
                 float* largest_high, float* largest_low);
  // The int8 codes of a row with |codes * step - row| <= step / 2, and the bound of RoughTable in head.py; returns the step, NaN for a row
  // that is not finite.
  float (*quantize)(const float* row, int64_t n, int8_t* codes, float* error);
  // The sum of n bytes taken as numbers of 32 bits, the last n % 4 one by one, modulo 2^32.
  uint32_t (*read)(const uint8_t* bytes, int64_t n);
  // Any of the types as float32.
  void (*widen[3])(const void* from, int64_t n, float* to);
};

struct Isa {
  const char* name;
  bool (*present)();
  const TernaryKernels* ternary;
  const FloatKernels* floats;
};

inline bool Always() { return true; }

#if defined(__x86_64__)
#ifdef BITNET_EMULATE
inline bool HasAvx2() { return true; }
inline bool HasAvxVnni() { return true; }
inline bool HasAvx512() { return true; }
inline bool HasAvx512Vnni() { return true; }
inline bool HasAvx512Vbmi() { return true; }
#else
inline bool HasAvx2() { return __builtin_cpu_supports("avx2"); }
inline bool HasAvxVnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return HasAvx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}
inline bool HasAvx512() { return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
inline bool HasAvx512Vnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }
inline bool HasAvx512Vbmi() { return HasAvx512Vnni() && __builtin_cpu_supports("avx512vbmi"); }
#endif
#elif defined(__aarch64__)
inline bool HasDotprod() { return getauxval(AT_HWCAP) & (1ul << 20); }  // HWCAP_ASIMDDP
inline bool HasI8mm() { return HasDotprod() && (getauxval(AT_HWCAP2) & (1ul << 13)); }  // HWCAP2_I8MM
#endif

}  // namespace bitnet
