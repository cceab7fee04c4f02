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
  const int64_t step = std::max<int64_t>(64, v / (threads * 64));
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

// x as step * codes + rest, with |codes|_1 small enough for `whole_dots`, and what that says of its rough logits.
struct WholeVector {
  bool finite;
  RoughBound bound;

  WholeVector(const float* x, int64_t d, int16_t* codes) {
    const double n = static_cast<double>(d);
    double largest = 0, sum = 0, square = 0, squares = 0;
    for (int64_t j = 0; j < d; j++) {
      const double size = std::fabs(static_cast<double>(x[j]));
      largest = std::max(largest, size), sum += size, square += size * size;
    }
    finite = std::isfinite(square);
    // |codes|_1 <= |x|_1 / step + d / 2
    const double step = finite && sum > 0 ? std::max(largest / 32767, sum / (2147483647.0 / 127 - 0.5 * n - 1)) : 1;
    for (int64_t j = 0; j < d; j++) {
      const double code = finite ? std::nearbyint(static_cast<double>(x[j]) / step) : 0, off = static_cast<double>(x[j]) - code * step;
      codes[j] = static_cast<int16_t>(code);
      squares += off * off;
    }
    // Rounded up, by more than the roundings of this function and of `bounds`. |c|_2 <= 127 sqrt(d); subnormal numbers may count as 0.
    const double norm = std::sqrt(square) * (1 + 1e-6), rest = std::sqrt(squares) + norm * 1e-9, row = 127 * std::sqrt(n) * (1 + 1e-6);
    bound = {step, norm, rest * row, (n + sum) * 0x1p-123, norm * row};
  }
};

// Tokens that share a pass over the int8 table, and rows of which the largest bounds are kept.
constexpr int64_t kSharedTokens = 4, kHeadBlock = 64;

// The k tokens with the largest logits among the first `limit`, those of Logits on `table`, equal ones by their id.
//
// With x = step * q + r and row v = scale * c + e, rough logit v is scale * step * (c . q), whose sum is exact, and
// |logit - rough logit| <= |x| * error[v] + |r| * scale * |c|, where |c|_2 <= 127 sqrt(d): this says which rows can be among the largest.
// Only those are read from `table`.
template <typename Pool>
void TopLogits(const FloatKernels& kernels, Pool& pool, int64_t threads, const float* x, Array table, Array rough,
                      const float* scale, const float* error, int64_t m, int64_t d, int64_t limit, int64_t k, int32_t* ids,
                      float* logits, int32_t* read) {
  const int64_t group = kSharedTokens, block = std::clamp<int64_t>(limit / k, 1, kHeadBlock);
  const int64_t blocks = (limit + block - 1) / block;  // at least k
  const int64_t step = std::max<int64_t>(1, blocks / (threads * 64));
  std::vector<int16_t> codes(static_cast<size_t>(group * d));
  std::vector<float> highs(static_cast<size_t>(group * limit)), high_of(static_cast<size_t>(group * blocks)), low_of(high_of.size());
  for (int64_t first = 0; first < m; first += group) {
    const int tokens = static_cast<int>(std::min(group, m - first));
    std::vector<WholeVector> vectors;
    for (int i = 0; i < tokens; i++) vectors.emplace_back(x + (first + i) * d, d, codes.data() + i * d);
    ParallelFor(pool, threads, (blocks + step - 1) / step, [&](int64_t task) {
      for (int64_t b = task * step; b < std::min(blocks, (task + 1) * step); b++) {
        const int64_t begin = b * block, count = std::min(block, limit - begin);
        int32_t sums[kSharedTokens * kHeadBlock];
        kernels.whole_dots(codes.data(), d, tokens, static_cast<const int8_t*>(rough.at(begin * d)), count, d, sums, kHeadBlock);
        for (int i = 0; i < tokens; i++) {
          const size_t place = static_cast<size_t>(i * blocks + b);
          kernels.bounds(sums + i * kHeadBlock, scale + begin, error + begin, count, vectors[static_cast<size_t>(i)].bound,
                         highs.data() + i * limit + begin, &high_of[place], &low_of[place]);
        }
      }
    });
    for (int64_t i = 0; i < tokens; i++) {
      int32_t* token_ids = ids + (first + i) * k;
      float* token_logits = logits + (first + i) * k;
      if (!vectors[static_cast<size_t>(i)].finite) {
        for (int64_t c = 0; c < k; c++) {
          token_ids[c] = static_cast<int32_t>(c);
          token_logits[c] = std::numeric_limits<float>::quiet_NaN();
        }
        read[first + i] = 0;
        continue;
      }
      // At least k rows, one of each of k blocks, have logits from the k-th largest of these on.
      const auto lows = low_of.begin() + i * blocks;
      std::nth_element(lows, lows + (k - 1), lows + blocks, std::greater<float>());
      const float threshold = lows[k - 1];
      std::vector<std::pair<float, int32_t>> rows;
      for (int64_t b = 0; b < blocks; b++) {
        if (high_of[static_cast<size_t>(i * blocks + b)] < threshold) continue;
        for (int64_t r = b * block; r < std::min(limit, (b + 1) * block); r++) {
          if (!(highs[static_cast<size_t>(i * limit + r)] < threshold)) rows.emplace_back(0.0f, static_cast<int32_t>(r));
        }
      }
      ParallelFor(pool, rows.size() < 64 ? 1 : threads, static_cast<int64_t>((rows.size() + 31) / 32), [&](int64_t b) {
        for (size_t c = static_cast<size_t>(b) * 32; c < std::min(rows.size(), static_cast<size_t>(b + 1) * 32); c++) {
          kernels.dots[static_cast<int>(table.type)](x + (first + i) * d, d, 1, table.at(rows[c].second * d), d, 1, d, &rows[c].first, 1);
        }
      });
      read[first + i] = static_cast<int32_t>(rows.size());
      const auto better = [](const auto& a, const auto& b) {  // NaN, of sums that overflow, before all numbers
        const bool whole_a = a.first == a.first, whole_b = b.first == b.first;
        if (whole_a != whole_b) return whole_b;
        return whole_a && a.first != b.first ? a.first > b.first : a.second < b.second;
      };
      std::partial_sort(rows.begin(), rows.begin() + k, rows.end(), better);
      for (int64_t c = 0; c < k; c++) {
        token_ids[c] = rows[static_cast<size_t>(c)].second;
        token_logits[c] = rows[static_cast<size_t>(c)].first;
      }
    }
  }
}

// The int8 table of rows [V, D]: codes [V, D], step and bound of the error of each row.
template <typename Pool>
void QuantizeRows(const FloatKernels& kernels, Pool& pool, int64_t threads, Array table, int64_t v, int64_t d, int8_t* codes, float* scale,
                  float* error) {
  ParallelFor(pool, threads, (v + 63) / 64, [&](int64_t b) {
    for (int64_t r = b * 64; r < std::min(v, (b + 1) * 64); r++) {
      scale[r] = kernels.quantize(Array{table.at(r * d), table.type}.widened(kernels, d).data(), d, codes + r * d, error + r);
    }
  });
}

// The sum of `bytes` as `read` defines it, as fast as memory can be read, each thread one stream after the other. Nothing is asked for in
// advance: the processor does that better where it has nothing else to do.
template <typename Pool>
uint32_t ReadBytes(const FloatKernels& kernels, Pool& pool, int64_t threads, const uint8_t* bytes, int64_t n) {
  const int64_t step = std::clamp<int64_t>(RoundUp(n / (threads * 8), 64), 4096, 1 << 17);
  std::atomic<uint32_t> total{0};
  ParallelFor(pool, threads, (n + step - 1) / step, [&](int64_t b) { total += kernels.read(bytes + b * step, std::min(n - b * step, step)); });
  return total;
}

// out[i, v] = sum_d x[i, d] * table[d, v], the terms of a sum added in order: the product with a table that stands the other way.
template <typename Pool>
void LogitsOfColumns(const FloatKernels& kernels, Pool& pool, int64_t threads, const float* x, Array table, int64_t m, int64_t v, int64_t d,
                     float* out) {
  constexpr int64_t step = 2048;  // long enough to be read as a stream, and sums of all of them stay in cache
  ParallelFor(pool, threads, (v + step - 1) / step, [&](int64_t b) {
    const int64_t begin = b * step, count = std::min(step, v - begin);
    std::vector<float> sums(static_cast<size_t>(m * count));
    kernels.combine[static_cast<int>(table.type)](x, d, static_cast<int>(m), table.at(begin), v, d, count, sums.data());
    for (int64_t i = 0; i < m; i++) std::copy_n(sums.data() + i * count, count, out + i * v + begin);
  });
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
