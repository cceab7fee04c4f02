// The library: kernels of every instruction set that the compiler knows, and the functions that XLA and Python call.
// Compiled once for a kind of machine; which kernels run is decided when they are called.
//
//   c++ -O3 -std=c++17 -fPIC -shared -DBITNET_KEY='"..."' -I$(python -c "import jax; print(jax.ffi.include_dir())") library.cc

#include <cmath>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "isas.h"
#include "xla/ffi/api/ffi.h"

namespace bitnet {

namespace ffi = xla::ffi;

namespace {

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

template <typename Function>
ffi::Error Guarded(const Function& function) {
  try {
    function();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "bitnet-jax: no memory for a native kernel");
  }
  return ffi::Error::Success();
}

#define BITNET_FIND_ISA()                                          \
  const Isa* isa = isa_name.empty() ? Best() : Find(isa_name);     \
  if (!isa) return Invalid("isa=" + std::string(isa_name) + " is not an instruction set of this machine"); \
  BITNET_RETURN_IF_ERROR(CheckThreads(threads))

// x int8 [M, K], x_scale float32 [M, 1], then for each stack of matrices codes uint8 [L, N, row_bytes], scale float32 [L] and int32 [], which
// of them is meant; a result [M, N] for each.
ffi::Error Ternary(ffi::ThreadPool pool, std::string_view encoding, std::string_view isa_name, int64_t threads, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  BITNET_FIND_ISA();
  if (encoding != "two_bit" && encoding != "base3") return Invalid("encoding=" + std::string(encoding) + " must be two_bit or base3");
  if (args.size() < 5 || args.size() != 2 + 3 * rets.size()) return Invalid("the numbers of operands and results do not fit");
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
    const ffi::AnyBuffer codes = *args.get<ffi::AnyBuffer>(2 + 3 * i), scale = *args.get<ffi::AnyBuffer>(3 + 3 * i);
    const ffi::AnyBuffer layer = *args.get<ffi::AnyBuffer>(4 + 3 * i), out = **rets.get<ffi::AnyBuffer>(i);
    BITNET_RETURN_IF_ERROR(Check("codes", codes, ffi::U8, {-1, -1, call.row_bytes}));
    const int64_t layers = codes.dimensions()[0], n = codes.dimensions()[1];
    BITNET_RETURN_IF_ERROR(Check("scale", scale, ffi::F32, {layers}));
    BITNET_RETURN_IF_ERROR(Check("layer", layer, ffi::S32, {}));
    const int64_t place = *layer.typed_data<int32_t>();
    if (place < 0 || place >= layers) {
      return Invalid("layer=" + std::to_string(place) + " must be from 0 to " + std::to_string(layers - 1));
    }
    call.bfloat16 = (i == 0 ? out.element_type() : call.bfloat16 ? ffi::BF16 : ffi::F32) == ffi::BF16;
    BITNET_RETURN_IF_ERROR(Check("out", out, call.bfloat16 ? ffi::BF16 : ffi::F32, {call.m, n}));
    call.matrices.push_back({codes.typed_data<uint8_t>() + place * n * call.row_bytes, scale.typed_data<float>()[place], n, out.untyped_data()});
  }
  return Guarded([&] { TernaryMatmul(*isa->ternary, call, pool, Threads(pool, threads)); });
}

// sums float32 [M, N], x_scale float32 [M, 1], scale float32 []; out [M, N]: what Ternary makes of sums that another product gave.
ffi::Error ScaleCall(ffi::ThreadPool pool, std::string_view isa_name, int64_t threads, ffi::AnyBuffer sums, ffi::AnyBuffer x_scale,
                     ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> out) {
  BITNET_FIND_ISA();
  BITNET_RETURN_IF_ERROR(Check("sums", sums, ffi::F32, {-1, -1}));
  const int64_t m = sums.dimensions()[0], n = sums.dimensions()[1];
  BITNET_RETURN_IF_ERROR(Check("x_scale", x_scale, ffi::F32, {m, 1}));
  BITNET_RETURN_IF_ERROR(Check("scale", scale, ffi::F32, {}));
  const bool bfloat16 = out->element_type() == ffi::BF16;
  BITNET_RETURN_IF_ERROR(Check("out", *out, bfloat16 ? ffi::BF16 : ffi::F32, {m, n}));
  return Guarded([&] {
    ParallelFor(pool, m * n < 1 << 16 ? 1 : Threads(pool, threads), m, [&](int64_t i) {
      const float step = x_scale.typed_data<float>()[i] * *scale.typed_data<float>();
      for (int64_t j = i * n; j < (i + 1) * n; j++) {
        const float value = sums.typed_data<float>()[j] * step;
        if (bfloat16) {
          static_cast<uint16_t*>(out->untyped_data())[j] = ToBfloat16(value);
        } else {
          out->typed_data<float>()[j] = value;
        }
      }
    });
  });
}

// The types that floating-point operands may have.
bool TypeOf(const ffi::AnyBuffer& buffer, bool int8, Array* array) {
  array->data = buffer.untyped_data();
  switch (buffer.element_type()) {
    case ffi::F32: array->type = Type::kFloat32; return true;
    case ffi::BF16: array->type = Type::kBfloat16; return true;
    case ffi::S8: array->type = Type::kInt8; return int8;
    default: return false;
  }
}

// x [M, D], table [V, D], scale float32 [V] for int8 tables, else [0]; logits float32 [M, V]. With `columns` the table is [D, V], and not int8.
ffi::Error LogitsCall(ffi::ThreadPool pool, std::string_view isa_name, int64_t threads, bool columns, ffi::AnyBuffer x, ffi::AnyBuffer table,
                      ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> out) {
  BITNET_FIND_ISA();
  Array values{}, rows{};
  if (!TypeOf(x, false, &values)) return Invalid("x must be float32 or bfloat16");
  if (!TypeOf(table, !columns, &rows)) return Invalid(columns ? "table must be float32 or bfloat16" : "table must be float32, bfloat16 or int8");
  BITNET_RETURN_IF_ERROR(Check("x", x, x.element_type(), {-1, -1}));
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1];
  BITNET_RETURN_IF_ERROR(Check("table", table, table.element_type(), columns ? std::vector<int64_t>{d, -1} : std::vector<int64_t>{-1, d}));
  const int64_t v = table.dimensions()[columns ? 1 : 0];
  const bool scaled = rows.type == Type::kInt8;
  BITNET_RETURN_IF_ERROR(Check("scale", scale, ffi::F32, {scaled ? v : 0}));
  BITNET_RETURN_IF_ERROR(Check("out", *out, ffi::F32, {m, v}));
  return Guarded([&] {
    const std::vector<float> wide = values.widened(*isa->floats, m * d);
    if (columns) {
      LogitsOfColumns(*isa->floats, pool, Threads(pool, threads), wide.data(), rows, m, v, d, out->typed_data<float>());
    } else {
      Logits(*isa->floats, pool, Threads(pool, threads), wide.data(), rows, scaled ? scale.typed_data<float>() : nullptr, m, v, d,
             out->typed_data<float>());
    }
  });
}

// x [M, D], table [V, D], rough int8 [V, D], scale and error float32 [V], limit int32 []; ids int32 [M, k], logits float32 [M, k],
// and how many rows of the table were read, int32 [M].
ffi::Error TopCall(ffi::ThreadPool pool, std::string_view isa_name, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer table,
                   ffi::AnyBuffer rough, ffi::AnyBuffer scale, ffi::AnyBuffer error_bound, ffi::AnyBuffer limit,
                   ffi::Result<ffi::AnyBuffer> ids, ffi::Result<ffi::AnyBuffer> logits, ffi::Result<ffi::AnyBuffer> read) {
  BITNET_FIND_ISA();
  Array values{}, rows{};
  if (!TypeOf(x, false, &values)) return Invalid("x must be float32 or bfloat16");
  if (!TypeOf(table, false, &rows)) return Invalid("table must be float32 or bfloat16");
  BITNET_RETURN_IF_ERROR(Check("x", x, x.element_type(), {-1, -1}));
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1];
  BITNET_RETURN_IF_ERROR(Check("table", table, table.element_type(), {-1, d}));
  const int64_t v = table.dimensions()[0];
  BITNET_RETURN_IF_ERROR(Check("rough", rough, ffi::S8, {v, d}));
  BITNET_RETURN_IF_ERROR(Check("scale", scale, ffi::F32, {v}));
  BITNET_RETURN_IF_ERROR(Check("error", error_bound, ffi::F32, {v}));
  BITNET_RETURN_IF_ERROR(Check("limit", limit, ffi::S32, {}));
  BITNET_RETURN_IF_ERROR(Check("ids", *ids, ffi::S32, {m, -1}));
  const int64_t k = ids->dimensions()[1], first = *limit.typed_data<int32_t>();
  BITNET_RETURN_IF_ERROR(Check("logits", *logits, ffi::F32, {m, k}));
  BITNET_RETURN_IF_ERROR(Check("read", *read, ffi::S32, {m}));
  if (k > first || first > v) {
    return Invalid("limit=" + std::to_string(first) + " must be from k=" + std::to_string(k) + " to V=" + std::to_string(v));
  }
  return Guarded([&] {
    TopLogits(*isa->floats, pool, Threads(pool, threads), values.widened(*isa->floats, m * d).data(), rows,
              Array{rough.untyped_data(), Type::kInt8}, scale.typed_data<float>(), error_bound.typed_data<float>(), m, d, first, k,
              ids->typed_data<int32_t>(), logits->typed_data<float>(), read->typed_data<int32_t>());
  });
}

// table [V, D]; codes int8 [V, D], scale and error float32 [V].
ffi::Error QuantizeCall(ffi::ThreadPool pool, std::string_view isa_name, int64_t threads, ffi::AnyBuffer table,
                        ffi::Result<ffi::AnyBuffer> codes, ffi::Result<ffi::AnyBuffer> scale, ffi::Result<ffi::AnyBuffer> error_bound) {
  BITNET_FIND_ISA();
  Array rows{};
  if (!TypeOf(table, false, &rows)) return Invalid("table must be float32 or bfloat16");
  BITNET_RETURN_IF_ERROR(Check("table", table, table.element_type(), {-1, -1}));
  const int64_t v = table.dimensions()[0], d = table.dimensions()[1];
  BITNET_RETURN_IF_ERROR(Check("codes", *codes, ffi::S8, {v, d}));
  BITNET_RETURN_IF_ERROR(Check("scale", *scale, ffi::F32, {v}));
  BITNET_RETURN_IF_ERROR(Check("error", *error_bound, ffi::F32, {v}));
  return Guarded([&] {
    QuantizeRows(*isa->floats, pool, Threads(pool, threads), rows, v, d, codes->typed_data<int8_t>(), scale->typed_data<float>(),
                 error_bound->typed_data<float>());
  });
}

// bytes uint8 [n]; their sum as numbers of 32 bits, uint32 [].
ffi::Error ReadCall(ffi::ThreadPool pool, std::string_view isa_name, int64_t threads, ffi::AnyBuffer bytes,
                    ffi::Result<ffi::AnyBuffer> sum) {
  BITNET_FIND_ISA();
  BITNET_RETURN_IF_ERROR(Check("bytes", bytes, ffi::U8, {-1}));
  BITNET_RETURN_IF_ERROR(Check("sum", *sum, ffi::U32, {}));
  return Guarded([&] {
    *sum->typed_data<uint32_t>() = ReadBytes(*isa->floats, pool, Threads(pool, threads), bytes.typed_data<uint8_t>(), bytes.dimensions()[0]);
  });
}

// q [B, T, N, H], keys and values [L, B, S, K, H], their scales float32 [L, B, S, K] if int8, else [0], layer int32 [], positions int32
// [B, T]; out [B, T, N, H] in the type of q.
ffi::Error AttentionHandler(ffi::ThreadPool pool, std::string_view isa_name, int64_t threads, ffi::AnyBuffer q, ffi::AnyBuffer k,
                            ffi::AnyBuffer v, ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale, ffi::AnyBuffer layer,
                            ffi::AnyBuffer positions, ffi::Result<ffi::AnyBuffer> out) {
  BITNET_FIND_ISA();
  AttentionCall call;
  if (!TypeOf(q, false, &call.q) || !TypeOf(*out, false, &call.out)) return Invalid("q must be float32 or bfloat16");
  if (!TypeOf(k, true, &call.k) || !TypeOf(v, true, &call.v)) return Invalid("keys and values must be float32, bfloat16 or int8");
  BITNET_RETURN_IF_ERROR(Check("q", q, q.element_type(), {-1, -1, -1, -1}));
  call.b = q.dimensions()[0], call.t = q.dimensions()[1], call.n = q.dimensions()[2], call.h = q.dimensions()[3];
  BITNET_RETURN_IF_ERROR(Check("keys", k, k.element_type(), {-1, call.b, -1, -1, call.h}));
  const int64_t layers = k.dimensions()[0];
  call.s = k.dimensions()[2], call.kv = k.dimensions()[3];
  BITNET_RETURN_IF_ERROR(Check("values", v, k.element_type(), {layers, call.b, call.s, call.kv, call.h}));
  if (call.n % call.kv) return Invalid("N=" + std::to_string(call.n) + " must be a multiple of K=" + std::to_string(call.kv));
  if (call.k.type == Type::kInt8) {
    BITNET_RETURN_IF_ERROR(Check("k_scale", k_scale, ffi::F32, {layers, call.b, call.s, call.kv}));
    BITNET_RETURN_IF_ERROR(Check("v_scale", v_scale, ffi::F32, {layers, call.b, call.s, call.kv}));
    call.k_scale = k_scale.typed_data<float>();
    call.v_scale = v_scale.typed_data<float>();
  }
  BITNET_RETURN_IF_ERROR(Check("layer", layer, ffi::S32, {}));
  BITNET_RETURN_IF_ERROR(Check("positions", positions, ffi::S32, {call.b, call.t}));
  BITNET_RETURN_IF_ERROR(Check("out", *out, q.element_type(), {call.b, call.t, call.n, call.h}));
  call.layer = *layer.typed_data<int32_t>();
  if (call.layer < 0 || call.layer >= layers) {
    return Invalid("layer=" + std::to_string(call.layer) + " must be from 0 to " + std::to_string(layers - 1));
  }
  call.positions = positions.typed_data<int32_t>();
  for (int64_t i = 0; i < call.b * call.t; i++) {
    if (call.positions[i] < 0 || call.positions[i] >= call.s) {
      return Invalid("positions hold " + std::to_string(call.positions[i]) + ": must be from 0 to " + std::to_string(call.s - 1));
    }
  }
  return Guarded([&] { Attention(*isa->floats, pool, Threads(pool, threads), call); });
}

// x [M, D], up [M, D] of the same type, or [0] for none, gain float32 [D]; codes int8 [M, D], step float32 [M, 1].
ffi::Error NormQuantizeCall(ffi::ThreadPool pool, std::string_view isa_name, int64_t threads, float eps, ffi::AnyBuffer x, ffi::AnyBuffer up,
                            ffi::AnyBuffer gain, ffi::Result<ffi::AnyBuffer> codes, ffi::Result<ffi::AnyBuffer> step) {
  BITNET_FIND_ISA();
  Array values{}, gate{};
  if (!TypeOf(x, false, &values)) return Invalid("x must be float32 or bfloat16");
  BITNET_RETURN_IF_ERROR(Check("x", x, x.element_type(), {-1, -1}));
  const int64_t m = x.dimensions()[0], d = x.dimensions()[1];
  if (up.dimensions().size() == 2) {
    BITNET_RETURN_IF_ERROR(Check("up", up, x.element_type(), {m, d}));
    gate = Array{up.untyped_data(), values.type};
  } else {
    BITNET_RETURN_IF_ERROR(Check("up", up, x.element_type(), {0}));
  }
  BITNET_RETURN_IF_ERROR(Check("gain", gain, ffi::F32, {d}));
  BITNET_RETURN_IF_ERROR(Check("codes", *codes, ffi::S8, {m, d}));
  BITNET_RETURN_IF_ERROR(Check("step", *step, ffi::F32, {m, 1}));
  if (!(eps >= 0)) return Invalid("eps=" + std::to_string(eps) + " must not be negative");
  return Guarded([&] {
    NormQuantize(*isa->floats, pool, Threads(pool, threads), values, gate, gain.typed_data<float>(), m, d, eps, codes->typed_data<int8_t>(),
                 step->typed_data<float>());
  });
}

}  // namespace
}  // namespace bitnet

#define BITNET_BINDING() \
  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attr<std::string_view>("isa").Attr<int64_t>("threads")
#define BITNET_ARG() Arg<xla::ffi::AnyBuffer>()
#define BITNET_RET() Ret<xla::ffi::AnyBuffer>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_logits, bitnet::LogitsCall,
                              BITNET_BINDING().Attr<bool>("columns").BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_RET());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_top_logits, bitnet::TopCall,
                              BITNET_BINDING().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_RET()
                                  .BITNET_RET().BITNET_RET());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_quantize_table, bitnet::QuantizeCall,
                              BITNET_BINDING().BITNET_ARG().BITNET_RET().BITNET_RET().BITNET_RET());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_read, bitnet::ReadCall, BITNET_BINDING().BITNET_ARG().BITNET_RET());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_attention, bitnet::AttentionHandler,
                              BITNET_BINDING().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_ARG()
                                  .BITNET_RET());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_norm_quantize, bitnet::NormQuantizeCall,
                              BITNET_BINDING().Attr<float>("eps").BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_RET().BITNET_RET());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_scale, bitnet::ScaleCall,
                              BITNET_BINDING().BITNET_ARG().BITNET_ARG().BITNET_ARG().BITNET_RET());
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
