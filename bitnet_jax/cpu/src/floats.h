// The vocabulary product, attention over a cache and the quantisation of activations, for any instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "isa.h"
#include "ternary.h"
#include "threads.h"

namespace bitnet {

struct Array {
  void* data;
  Type type;

  int64_t size() const { return type == Type::kFloat32 ? 4 : type == Type::kBfloat16 ? 2 : 1; }
  void* at(int64_t index) const { return static_cast<char*>(data) + index * size(); }
  std::vector<float> widened(const FloatKernels& kernels, int64_t n) const {
    std::vector<float> out(static_cast<size_t>(n));
    kernels.widen[static_cast<int>(type)](data, n, out.data());
    return out;
  }
};

// out[i, v] = (sum_d x[i, d] * table[v, d]) * scale[v], without the factor where scale is null.
template <typename Pool>
void Logits(const FloatKernels& kernels, Pool& pool, int64_t threads, const float* x, Array table, const float* scale,
                   int64_t m, int64_t v, int64_t d, float* out) {
  const int64_t step = std::max<int64_t>(64, v / (threads * 16));
  ParallelFor(pool, threads, (v + step - 1) / step, [&](int64_t b) {
    const int64_t end = std::min(v, (b + 1) * step);
    for (int64_t r = b * step; r < end; r += 16) {  // rows that stay in cache until all tokens have met them
      const int64_t count = std::min<int64_t>(16, end - r);
      for (int64_t i = 0; i < m; i += 4) {
        const int tokens = static_cast<int>(std::min<int64_t>(4, m - i));
        kernels.dots[static_cast<int>(table.type)](x + i * d, d, tokens, table.at(r * d), d, count, d, out + i * v + r, v);
        if (!scale) continue;
        for (int t = 0; t < tokens; t++) {
          for (int64_t c = 0; c < count; c++) out[(i + t) * v + r + c] *= scale[r + c];
        }
      }
    }
  });
}

// The k tokens with the largest logits among the first `limit`, those of Logits on `table`, equal ones by their id.
// |logit - rough logit| <= |x| * error[v] says which rows can be among them; only those are read from `table`.
template <typename Pool>
void TopLogits(const FloatKernels& kernels, Pool& pool, int64_t threads, const float* x, Array table, Array rough,
                      const float* scale, const float* error, int64_t m, int64_t d, int64_t limit, int64_t k, int32_t* ids,
                      float* logits, int32_t* read) {
  std::vector<float> approximate(static_cast<size_t>(m * limit));
  Logits(kernels, pool, threads, x, rough, scale, m, limit, d, approximate.data());
  std::vector<double> low(static_cast<size_t>(limit));
  for (int64_t i = 0; i < m; i++) {
    const float* token = x + i * d;
    double square = 0;
    for (int64_t j = 0; j < d; j++) square += static_cast<double>(token[j]) * token[j];
    const double norm = std::sqrt(square) * (1 + 1e-6);  // and error is rounded up: together more than the roundings here
    const float* rough_logits = approximate.data() + i * limit;
    if (!std::isfinite(norm)) {
      for (int64_t c = 0; c < k; c++) {
        ids[i * k + c] = static_cast<int32_t>(c);
        logits[i * k + c] = std::numeric_limits<float>::quiet_NaN();
      }
      read[i] = 0;
      continue;
    }
    for (int64_t r = 0; r < limit; r++) low[static_cast<size_t>(r)] = rough_logits[r] - norm * error[r];
    std::nth_element(low.begin(), low.begin() + (k - 1), low.end(), std::greater<double>());
    const double threshold = low[static_cast<size_t>(k - 1)];
    std::vector<std::pair<float, int32_t>> rows;
    for (int64_t r = 0; r < limit; r++) {
      if (!(rough_logits[r] + norm * error[r] < threshold)) rows.emplace_back(0.0f, static_cast<int32_t>(r));
    }
    ParallelFor(pool, rows.size() < 64 ? 1 : threads, static_cast<int64_t>((rows.size() + 31) / 32), [&](int64_t b) {
      for (size_t c = static_cast<size_t>(b) * 32; c < std::min(rows.size(), static_cast<size_t>(b + 1) * 32); c++) {
        kernels.dots[static_cast<int>(table.type)](token, d, 1, table.at(rows[c].second * d), d, 1, d, &rows[c].first, 1);
      }
    });
    read[i] = static_cast<int32_t>(rows.size());
    const auto better = [](const auto& a, const auto& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); };
    std::partial_sort(rows.begin(), rows.begin() + k, rows.end(), better);
    for (int64_t c = 0; c < k; c++) {
      ids[i * k + c] = rows[static_cast<size_t>(c)].second;
      logits[i * k + c] = rows[static_cast<size_t>(c)].first;
    }
  }
}

struct AttentionCall {
  Array q, k, v, out;                          // [B, T, N, H], [L, B, S, K, H] twice, [B, T, N, H]
  const float *k_scale = nullptr, *v_scale = nullptr;  // [L, B, S, K] of an int8 cache
  const int32_t* positions;                    // [B, T]
  int64_t b, t, n, h, s, kv, layer;
};

// softmax(q k^T / sqrt(H)) v over the keys 0 to its position of each query. Keys behind it are not touched.
template <typename Pool>
void Attention(const FloatKernels& kernels, Pool& pool, int64_t threads, const AttentionCall& call) {
  const int64_t group = call.n / call.kv, h = call.h;
  const float factor = 1.0f / std::sqrt(static_cast<float>(h));
  ParallelFor(pool, threads, call.b * call.t * call.kv, [&](int64_t task) {
    const int64_t head = task % call.kv, query = task / call.kv, row = query / call.t;
    const int64_t count = call.positions[query] + int64_t{1};
    const int64_t place = ((call.layer * call.b + row) * call.s) * call.kv + head;  // of key 0, in units of H
    const Array part{call.q.at((query * call.n + head * group) * h), call.q.type};
    const std::vector<float> q = part.widened(kernels, group * h);
    std::vector<float> scores(static_cast<size_t>(group * count)), out(static_cast<size_t>(group * h));
    for (int64_t g = 0; g < group; g += 4) {
      kernels.dots[static_cast<int>(call.k.type)](q.data() + g * h, h, static_cast<int>(std::min<int64_t>(4, group - g)), call.k.at(place * h),
                                                  call.kv * h, count, h, scores.data() + g * count, count);
    }
    for (int64_t g = 0; g < group; g++) {
      float* weights = scores.data() + g * count;
      for (int64_t s = 0; s < count; s++) {
        weights[s] *= factor;
        if (call.k_scale) weights[s] *= call.k_scale[place + s * call.kv];
      }
      const float sum = kernels.exponentials(weights, count);
      for (int64_t s = 0; s < count; s++) {
        weights[s] /= sum;
        if (call.v.type == Type::kBfloat16) {
          const uint32_t bits = static_cast<uint32_t>(ToBfloat16(weights[s])) << 16;
          std::memcpy(weights + s, &bits, sizeof bits);
        }
        if (call.v_scale) weights[s] *= call.v_scale[place + s * call.kv];
      }
    }
    kernels.combine[static_cast<int>(call.v.type)](scores.data(), count, static_cast<int>(group), call.v.at(place * h), call.kv * h, count, h,
                                                   out.data());
    const int64_t to = (query * call.n + head * group) * h;
    for (int64_t j = 0; j < group * h; j++) {
      if (call.out.type == Type::kBfloat16) {
        static_cast<uint16_t*>(call.out.data)[to + j] = ToBfloat16(out[static_cast<size_t>(j)]);
      } else {
        static_cast<float*>(call.out.data)[to + j] = out[static_cast<size_t>(j)];
      }
    }
  });
}

// Each row of x [M, D], or of relu(x)^2 * up where up.data is given, normalised, times gain, as int8 codes and their step.
template <typename Pool>
void NormQuantize(const FloatKernels& kernels, Pool& pool, int64_t threads, Array x, Array up, const float* gain,
                         int64_t m, int64_t d, float eps, int8_t* codes, float* step) {
  const bool round = x.type == Type::kBfloat16;
  ParallelFor(pool, m * d < 1 << 15 ? 1 : threads, m, [&](int64_t i) {
    std::vector<float> row = Array{x.at(i * d), x.type}.widened(kernels, d);
    if (up.data) kernels.relu2(row.data(), Array{up.at(i * d), up.type}.widened(kernels, d).data(), d, round, row.data());
    step[i] = kernels.norm_quantize(row.data(), gain, d, eps, round, codes + i * d);
  });
}

}  // namespace bitnet
