// The library: kernels of every instruction set that the compiler knows, and the functions that XLA and Python call.
// Compiled once for a kind of machine; which kernels run is decided when they are called.
//
//   c++ -O3 -std=c++17 -fPIC -shared -DBITNET_KEY='"..."' -I$(python -c "import jax; print(jax.ffi.include_dir())") library.cc

#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "isa.h"
#include "ternary.h"
#include "ternary_scalar.inc"
#if defined(__x86_64__)
#include "ternary_x86.inc"
#elif defined(__aarch64__)
#include "ternary_neon.inc"
#endif

namespace bitnet {
namespace {

// From the plainest to the fastest.
const Isa kIsas[] = {
    {"scalar", Always, &scalar::kTernary},
#if defined(__x86_64__)
    {"avx2", HasAvx2, &avx2::pairs::kTernary},
#ifdef BITNET_AVX_VNNI
    {"avx_vnni", HasAvxVnni, &avx_vnni::kTernary},
#endif
    {"avx512", HasAvx512, &avx512::pairs::kTernary},
    {"avx512_vnni", HasAvx512Vnni, &avx512_vnni::kTernary},
#elif defined(__aarch64__)
    {"neon_dotprod", HasDotprod, &neon::dotprod::kTernary},
#endif
};

// The instruction set of that name if the machine has it; the best one for "".
const Isa* Find(std::string_view name) {
  const Isa* found = nullptr;
  for (const Isa& isa : kIsas) {
    if (isa.present() && (name.empty() || name == isa.name)) found = &isa;
  }
  return found;
}

const Isa* Best() {
  static const Isa* best = Find("");
  return best;
}

std::string Shape(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (const int64_t size : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("bitnet-jax: " + message); }

// An error where `buffer` has another type or shape than it must have; -1 stands for any size from 1 on.
ffi::Error Check(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type, const std::vector<int64_t>& sizes) {
  bool right = buffer.element_type() == type && buffer.dimensions().size() == sizes.size();
  std::string rule = "[";
  for (size_t i = 0; i < sizes.size(); i++) {
    right = right && (sizes[i] < 0 ? buffer.dimensions()[i] >= 1 : buffer.dimensions()[i] == sizes[i]);
    rule += (i ? ", " : "") + (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
  }
  for (const int64_t size : buffer.dimensions()) right = right && size <= INT32_MAX;
  if (right) return ffi::Error::Success();
  return Invalid(std::string(name) + " has element type " + std::to_string(static_cast<int>(buffer.element_type())) + " and shape " +
                 Shape(buffer) + ": must be element type " + std::to_string(static_cast<int>(type)) + " and shape " + rule + "], in int32");
}

ffi::Error CheckThreads(int64_t threads) {
  if (threads >= 1 || threads == -1) return ffi::Error::Success();
  return Invalid("threads=" + std::to_string(threads) + " must be at least 1, or -1 for all");
}

#define BITNET_RETURN_IF_ERROR(expression)                 \
  if (ffi::Error error = (expression); error.failure()) { \
    return error;                                          \
  }

// x int8 [M, K], x_scale float32 [M, 1], then codes uint8 [N, row_bytes] and scale float32 [] of each matrix; a result [M, N] for each.
ffi::Error Ternary(ffi::ThreadPool pool, std::string_view encoding, std::string_view isa_name, int64_t threads, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  const Isa* isa = isa_name.empty() ? Best() : Find(isa_name);
  if (!isa) return Invalid("isa=" + std::string(isa_name) + " is not an instruction set of this machine");
  BITNET_RETURN_IF_ERROR(CheckThreads(threads));
  if (encoding != "two_bit" && encoding != "base3") return Invalid("encoding=" + std::string(encoding) + " must be two_bit or base3");
  if (args.size() < 4 || args.size() != 2 + 2 * rets.size()) return Invalid("the numbers of operands and results do not fit");
  const ffi::AnyBuffer x = *args.get<ffi::AnyBuffer>(0), x_scale = *args.get<ffi::AnyBuffer>(1);
  BITNET_RETURN_IF_ERROR(Check("x", x, ffi::S8, {-1, -1}));
  TernaryCall call;
  call.m = x.dimensions()[0];
  call.k = x.dimensions()[1];
  BITNET_RETURN_IF_ERROR(Check("x_scale", x_scale, ffi::F32, {call.m, 1}));
  if (call.k >= 1 << 24) return Invalid("K=" + std::to_string(call.k) + " must be at most 16777215");
  call.x = x.typed_data<int8_t>();
  call.x_scale = x_scale.typed_data<float>();
  call.encoding = encoding == "two_bit" ? Encoding::kTwoBit : Encoding::kBase3;
  call.row_bytes = call.encoding == Encoding::kTwoBit ? RoundUp(call.k, 128) / 4 : (call.k + 4) / 5;
  for (size_t i = 0; i < rets.size(); i++) {
    const ffi::AnyBuffer codes = *args.get<ffi::AnyBuffer>(2 + 2 * i), scale = *args.get<ffi::AnyBuffer>(3 + 2 * i);
    const ffi::AnyBuffer out = **rets.get<ffi::AnyBuffer>(i);
    BITNET_RETURN_IF_ERROR(Check("codes", codes, ffi::U8, {-1, call.row_bytes}));
    BITNET_RETURN_IF_ERROR(Check("scale", scale, ffi::F32, {}));
    const int64_t n = codes.dimensions()[0];
    call.bfloat16 = (i == 0 ? out.element_type() : call.bfloat16 ? ffi::BF16 : ffi::F32) == ffi::BF16;
    BITNET_RETURN_IF_ERROR(Check("out", out, call.bfloat16 ? ffi::BF16 : ffi::F32, {call.m, n}));
    call.matrices.push_back({codes.typed_data<uint8_t>(), *scale.typed_data<float>(), n, out.untyped_data()});
  }
  try {
    TernaryMatmul(*isa->ternary, call, pool, Threads(pool, threads));
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "bitnet-jax: no memory for a ternary product");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace bitnet

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_ternary_matmul, bitnet::Ternary,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("encoding")
                                  .Attr<std::string_view>("isa")
                                  .Attr<int64_t>("threads")
                                  .RemainingArgs()
                                  .RemainingRets());

// What this library was built from: it is used only where that is what the caller has.
extern "C" const char* bitnet_key() { return BITNET_KEY; }

// Names of the instruction sets that this library has kernels for and this machine runs, from the plainest to the fastest.
extern "C" const char* bitnet_isas() {
  static const std::string names = [] {
    std::string text;
    for (const bitnet::Isa& isa : bitnet::kIsas) {
      if (isa.present()) text += (text.empty() ? "" : " ") + std::string(isa.name);
    }
    return text;
  }();
  return names.c_str();
}
