// The kernels of every instruction set against plain loops, without XLA: for emulators, cross compilers and sanitizers.
//
//   c++ -O1 -g -std=c++17 -fsanitize=address,undefined -ffp-contract=off -I bitnet_jax/cpu/src tests/cpu/kernels_test.cc && ./a.out
//
// Buffers have exactly the bytes that a call may touch. -DBITNET_EMULATE runs AVX-512 on SIMDe. The names of the sets that ran are printed.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include "isas.h"

namespace {

struct Pool {
  int64_t num_threads() const { return 2; }
  void Schedule(std::function<void()> work) { std::thread(work).detach(); }
};

uint64_t state = 1;
uint32_t Random() { return static_cast<uint32_t>((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 33); }

int failures = 0;
void Expect(bool right, const char* isa, const char* what, int64_t m, int64_t k, int64_t n) {
  if (right) return;
  failures++;
  std::printf("%s: %s is wrong for M=%ld K=%ld N=%ld\n", isa, what, static_cast<long>(m), static_cast<long>(k), static_cast<long>(n));
}

void Ternary(const bitnet::Isa& isa, bitnet::Encoding encoding, int64_t m, int64_t k, int64_t n, int fill) {
  const bool two = encoding == bitnet::Encoding::kTwoBit;
  const int64_t planes = two ? 4 : 5, bytes = two ? (k + 127) / 128 * 32 : (k + 4) / 5, run = two ? 32 : bytes;
  std::vector<int8_t> x(static_cast<size_t>(m * k));
  std::vector<int> w(static_cast<size_t>(n * k));
  for (auto& value : x) value = static_cast<int8_t>(fill ? (fill > 0 ? 127 : -128) : static_cast<int>(Random() & 255) - 128);
  for (auto& value : w) value = fill ? 1 : static_cast<int>(Random() % 3) - 1;
  std::vector<uint8_t> codes(static_cast<size_t>(n * bytes));
  for (int64_t r = 0; r < n; r++) {
    for (int64_t j = 0; j < bytes; j++) {
      int byte = 0;
      for (int64_t p = 0; p < planes; p++) {
        const int64_t feature = j / run * run * planes + p * run + j % run;
        byte = byte * (two ? 4 : 3) + (feature < k ? w[static_cast<size_t>(r * k + feature)] + 1 : 1);
      }
      codes[static_cast<size_t>(r * bytes + j)] = static_cast<uint8_t>(byte);
    }
  }
  std::vector<float> x_scale(static_cast<size_t>(m), 1.0f), out(static_cast<size_t>(m * n));
  bitnet::TernaryCall call{x.data(), x_scale.data(), m, k, encoding, bytes, false, {{codes.data(), 1.0f, n, out.data()}}};
  Pool pool;
  bitnet::TernaryMatmul(*isa.ternary, call, pool, 2);
  bool right = true;
  for (int64_t i = 0; i < m; i++) {
    for (int64_t r = 0; r < n; r++) {
      int64_t sum = 0;
      for (int64_t f = 0; f < k; f++) sum += int64_t{x[static_cast<size_t>(i * k + f)]} * w[static_cast<size_t>(r * k + f)];
      right = right && out[static_cast<size_t>(i * n + r)] == static_cast<float>(sum);
    }
  }
  Expect(right, isa.name, two ? "two_bit" : "base3", m, k, n);
}

void Floats(const bitnet::Isa& isa, int64_t m, int64_t v, int64_t d) {
  std::vector<float> x(static_cast<size_t>(m * d)), out(static_cast<size_t>(m * v)), error(static_cast<size_t>(v), 1.0f);
  std::vector<uint16_t> table(static_cast<size_t>(v * d));
  std::vector<int8_t> rough(static_cast<size_t>(v * d));
  std::vector<float> scale(static_cast<size_t>(v), 0.5f);
  for (auto& value : x) value = static_cast<float>(static_cast<int>(Random() % 255) - 127);
  for (size_t i = 0; i < table.size(); i++) {
    const int value = static_cast<int>(Random() % 255) - 127;
    table[i] = bitnet::ToBfloat16(static_cast<float>(value) / 2);
    rough[i] = static_cast<int8_t>(value);
  }
  Pool pool;
  const bitnet::Array rows{table.data(), bitnet::Type::kBfloat16};
  bitnet::Logits(*isa.floats, pool, 2, x.data(), rows, nullptr, m, v, d, out.data());
  bool right = true;
  for (int64_t i = 0; i < m; i++) {
    for (int64_t r = 0; r < v; r++) {
      double sum = 0;
      for (int64_t j = 0; j < d; j++) sum += x[static_cast<size_t>(i * d + j)] * (rough[static_cast<size_t>(r * d + j)] * 0.5);
      right = right && out[static_cast<size_t>(i * v + r)] == static_cast<float>(sum);
    }
  }
  Expect(right, isa.name, "logits", m, d, v);
  std::vector<int32_t> ids(static_cast<size_t>(m)), read(static_cast<size_t>(m));
  std::vector<float> best(static_cast<size_t>(m));
  for (auto& value : error) value = 1e-3f;
  for (int64_t r = 0; r < v; r++) {  // the int8 table of a table of whole numbers up to 127 / 2 is that table
    std::vector<float> row(static_cast<size_t>(d), 63.5f);
    std::vector<int8_t> nearest(static_cast<size_t>(d));
    for (int64_t j = 1; j < d; j++) row[static_cast<size_t>(j)] = rough[static_cast<size_t>(r * d + j)] * 0.5f;
    float bound = 0;
    right = isa.floats->quantize(row.data(), d, nearest.data(), &bound) == 0.5f && nearest[0] == 127;
    right = right && bound < 0.01f * static_cast<float>(d);
    for (int64_t j = 1; j < d; j++) right = right && nearest[static_cast<size_t>(j)] == rough[static_cast<size_t>(r * d + j)];
    if (!right) break;
  }
  Expect(right, isa.name, "quantize", 1, d, v);
  bitnet::TopLogits(*isa.floats, pool, 2, x.data(), rows, bitnet::Array{rough.data(), bitnet::Type::kInt8}, scale.data(), error.data(), m, d, v,
                    1, ids.data(), best.data(), read.data());
  right = true;
  for (int64_t i = 0; i < m; i++) {
    int64_t top = 0;
    for (int64_t r = 1; r < v; r++) top = out[static_cast<size_t>(i * v + r)] > out[static_cast<size_t>(i * v + top)] ? r : top;
    right = right && ids[static_cast<size_t>(i)] == top && best[static_cast<size_t>(i)] == out[static_cast<size_t>(i * v + top)];
  }
  Expect(right, isa.name, "top logits", m, d, v);
  std::vector<int8_t> quantized(static_cast<size_t>(d));
  std::vector<float> gain(static_cast<size_t>(d), 1.0f);
  float step = 0, largest = 0;
  bitnet::NormQuantize(*isa.floats, pool, 2, bitnet::Array{x.data(), bitnet::Type::kFloat32}, bitnet::Array{nullptr, bitnet::Type::kFloat32},
                       gain.data(), 1, d, 0.0f, quantized.data(), &step);
  for (int64_t j = 0; j < d; j++) largest = std::fmax(largest, std::fabs(x[static_cast<size_t>(j)]));
  right = true;
  for (int64_t j = 0; j < d; j++) {
    right = right && std::fabs(quantized[static_cast<size_t>(j)] - x[static_cast<size_t>(j)] * 127 / std::fmax(largest, 1e-30f)) <= 0.501f;
  }
  Expect(right, isa.name, "norm_quantize", 1, d, 1);
}

// The largest sums that the first pass of TopLogits may meet: 127 * |x|_1 just below 2^31.
void Whole(const bitnet::Isa& isa, int64_t d) {
  const int16_t most = static_cast<int16_t>(std::min<int64_t>(32767, INT32_MAX / 127 / d));
  for (const int sign : {1, -1}) {
    std::vector<int16_t> x(static_cast<size_t>(4 * d), static_cast<int16_t>(sign * most));
    std::vector<int8_t> rows(static_cast<size_t>(3 * d), 127);
    for (const int m : {1, 2, 3, 4}) {
      std::vector<int32_t> out(static_cast<size_t>(3 * m));
      isa.floats->whole_dots(x.data(), d, m, rows.data(), 3, d, out.data(), 3);
      bool right = true;
      for (const int32_t sum : out) right = right && sum == sign * 127 * most * d;
      Expect(right, isa.name, "whole dots", m, d, 3);
    }
  }
}

void Read(const bitnet::Isa& isa) {
  Pool pool;
  for (const int64_t n : {1, 64, 65, 4095, 4161, 100000, 300007}) {
    std::vector<uint8_t> bytes(static_cast<size_t>(n));
    uint32_t sum = 0;
    for (int64_t j = 0; j < n; j++) {
      bytes[static_cast<size_t>(j)] = static_cast<uint8_t>(Random());
      sum += static_cast<uint32_t>(bytes[static_cast<size_t>(j)]) << (j < n / 4 * 4 ? j % 4 * 8 : 0);
    }
    Expect(bitnet::ReadBytes(*isa.floats, pool, 2, bytes.data(), n) == sum, isa.name, "read", 1, 1, n);
  }
}

void Attend(const bitnet::Isa& isa, int64_t present, int64_t h) {
  const int64_t n = 6, kv = 2;
  std::vector<float> q(static_cast<size_t>(n * h)), k(static_cast<size_t>(present * kv * h)), v(k.size()), out(q.size());
  for (auto* part : {&q, &k, &v}) {
    for (auto& value : *part) value = static_cast<float>(static_cast<int>(Random() % 201) - 100) / 100;
  }
  const int32_t position = static_cast<int32_t>(present - 1);
  bitnet::AttentionCall call;
  const auto array = [](std::vector<float>& part) { return bitnet::Array{part.data(), bitnet::Type::kFloat32}; };
  call.q = array(q), call.k = array(k), call.v = array(v), call.out = array(out), call.positions = &position;
  call.b = call.t = 1, call.n = n, call.h = h, call.s = present, call.kv = kv, call.layer = 0;
  Pool pool;
  bitnet::Attention(*isa.floats, pool, 2, call);
  bool right = true;
  for (int64_t head = 0; head < n; head++) {
    const int64_t group = head / (n / kv);
    std::vector<double> weights(static_cast<size_t>(present)), sums(static_cast<size_t>(h));
    double total = 0;
    for (int64_t s = 0; s < present; s++) {
      double score = 0;
      for (int64_t j = 0; j < h; j++) score += double{q[static_cast<size_t>(head * h + j)]} * k[static_cast<size_t>((s * kv + group) * h + j)];
      total += weights[static_cast<size_t>(s)] = std::exp(score / std::sqrt(static_cast<double>(h)));
    }
    for (int64_t j = 0; j < h; j++) {
      double sum = 0;
      for (int64_t s = 0; s < present; s++) sum += weights[static_cast<size_t>(s)] / total * v[static_cast<size_t>((s * kv + group) * h + j)];
      right = right && std::fabs(sum - out[static_cast<size_t>(head * h + j)]) < 1e-5;
    }
  }
  Expect(right, isa.name, "attention", present, h, n);
}

}  // namespace

// Work that is handed to a thread that stays is done by it, once.
void Stay() {
  for (int round = 0; round < 3; round++) {
    std::atomic<int> done{0};
    std::atomic<bool> handed{false};
    while (!handed.load()) {
      std::thread thread([] { bitnet::Crew::Get().Stay(); });
      for (int tries = 0; tries < 100000 && !handed.load(); tries++) handed = bitnet::Crew::Get().Hand([&done] { done++; });
      thread.join();
    }
    Expect(done.load() == 1 && !bitnet::Crew::Get().Hand([] {}), "any", "stay", 1, 1, round);
  }
}

int main() {
  Stay();
  for (const bitnet::Isa& isa : bitnet::kIsas) {
    if (!isa.present()) continue;
    std::printf("%s\n", isa.name);
    for (const auto encoding : {bitnet::Encoding::kTwoBit, bitnet::Encoding::kBase3}) {
      for (const int64_t m : {1, 2, 3, 4, 5, 9, 19}) {
        for (const int64_t k : {1, 37, 128, 300, 2561, 9000}) {
          for (const int64_t n : {1, 7, 40}) Ternary(isa, encoding, m, k, n, 0);
        }
      }
      for (const int fill : {1, -1}) {
        for (const int64_t m : {1, 2, 4, 18}) Ternary(isa, encoding, m, 45568, 2, fill);
      }
      Ternary(isa, encoding, 130, 300, 37, 0);  // more tokens and rows than are multiplied at once
    }
    for (const int64_t d : {1, 31, 64, 257}) {
      for (const int64_t m : {1, 3, 6}) Floats(isa, m, 70, d);
    }
    for (const int64_t d : {1, 63, 516, 2560, 45568}) Whole(isa, d);
    Read(isa);
    for (const int64_t h : {7, 8, 20, 128}) Attend(isa, 33, h);
  }
  return failures != 0;
}
