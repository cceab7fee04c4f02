// int8 activations times packed ternary weights, for any instruction set. The bytes are those of kernels_pallas/packing.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace bitnet {

struct Matrix {
  const uint8_t* codes;  // [n, row_bytes]
  float scale;
  int64_t n;
  void* out;  // [m, n]
};

struct TernaryCall {
  const int8_t* x;       // [m, k]
  const float* x_scale;  // [m]
  int64_t m, k;
  Encoding encoding;
  int64_t row_bytes;
  bool bfloat16;  // type of out, else float32
  std::vector<Matrix> matrices;
};

inline uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// For up to this many tokens a row is decoded while it is multiplied, once for every four; for more it pays to unpack rows first.
constexpr int64_t kFewTokens[2] = {8, 4};  // by encoding
constexpr int64_t kDecodedRows = 16;       // which stay in the nearest cache until all tokens have met them
constexpr int64_t kUnpackedRows = 16, kTokenBlock = 512, kUnpackedLength = 8192;

// One row of activations in the order in which kernels meet the packed bytes: blocks of `block` bytes, the last one filled up to kRowStep,
// in each the P planes of the block one after the other. Zeros stand where no input feature is. Returns the sum of the row.
inline int32_t Arrange(const int8_t* x, int64_t k, int64_t planes, int64_t run, int64_t row_bytes, int64_t padded, int64_t block, int8_t* out) {
  std::memset(out, 0, static_cast<size_t>(padded * planes));
  for (int64_t begin = 0; begin < row_bytes; begin += block) {
    const int64_t bytes = std::min(block, padded - begin), end = std::min(begin + block, row_bytes);
    for (int64_t j = begin; j < end;) {
      const int64_t first = j / run * run, length = std::min(first + run, end) - j;
      for (int64_t p = 0; p < planes; p++) {
        const int64_t feature = first * planes + p * run + (j - first);
        if (feature >= k) break;
        std::memcpy(out + begin * planes + p * bytes + (j - begin), x + feature, static_cast<size_t>(std::min(length, k - feature)));
      }
      j += length;
    }
  }
  int32_t sum = 0;
  for (int64_t i = 0; i < k; i++) sum += x[i];
  return sum;
}

// out[i, n] = float(sum_k x[i, k] * w[n, k]) * (x_scale[i] * scale), the sum exact, rounded once to float32 and once to the type of out.
template <typename Pool>
void TernaryMatmul(const TernaryKernels& kernels, const TernaryCall& call, Pool& pool, int64_t threads) {
  const int code = static_cast<int>(call.encoding);
  const int64_t planes = call.encoding == Encoding::kTwoBit ? 4 : 5, run = call.encoding == Encoding::kTwoBit ? 32 : call.row_bytes;
  const int64_t padded = RoundUp(call.row_bytes, kRowStep), length = padded * planes, block = kernels.block[code], m = call.m;

  std::unique_ptr<int8_t, decltype(&std::free)> arranged(static_cast<int8_t*>(std::aligned_alloc(64, static_cast<size_t>(m * length))),
                                                         &std::free);
  if (!arranged) throw std::bad_alloc();
  std::vector<int32_t> sums(static_cast<size_t>(m));
  const int8_t* x = arranged.get();
  const int64_t group = 16;
  ParallelFor(pool, threads, (m + group - 1) / group, [&](int64_t g) {
    for (int64_t i = g * group; i < std::min(m, (g + 1) * group); i++) {
      sums[static_cast<size_t>(i)] =
          Arrange(call.x + i * call.k, call.k, planes, run, call.row_bytes, padded, block, arranged.get() + i * length);
    }
  });

  // Blocks of rows: long enough to be a stream, and enough of them that threads end together.
  const bool few = m <= kFewTokens[code];
  int64_t rows = 0;
  for (const Matrix& matrix : call.matrices) rows += matrix.n;
  const int64_t work = rows * length * m;
  if (work < 1 << 18) threads = 1;  // waking a thread takes as long
  const int64_t step = !few ? kUnpackedRows : threads == 1 ? rows : std::max<int64_t>(8, RoundUp(rows / (threads * 8), 8));
  std::vector<std::pair<const Matrix*, int64_t>> blocks;
  for (const Matrix& matrix : call.matrices) {
    for (int64_t begin = 0; begin < matrix.n; begin += step) blocks.emplace_back(&matrix, begin);
  }

  const auto put = [&](const Matrix& matrix, int64_t token, int64_t begin, int64_t count, const uint32_t* acc) {
    const float scale = call.x_scale[token] * matrix.scale;
    const uint32_t offset = static_cast<uint32_t>(sums[static_cast<size_t>(token)]);  // codes are one more than weights
    const int64_t place = token * matrix.n + begin;
    if (call.bfloat16) {
      uint16_t* out = static_cast<uint16_t*>(matrix.out) + place;
      for (int64_t r = 0; r < count; r++) out[r] = ToBfloat16(static_cast<float>(static_cast<int32_t>(acc[r] - offset)) * scale);
    } else {
      float* out = static_cast<float*>(matrix.out) + place;
      for (int64_t r = 0; r < count; r++) out[r] = static_cast<float>(static_cast<int32_t>(acc[r] - offset)) * scale;
    }
  };

  ParallelFor(pool, threads, static_cast<int64_t>(blocks.size()), [&](int64_t index) {
    const Matrix& matrix = *blocks[static_cast<size_t>(index)].first;
    const int64_t begin = blocks[static_cast<size_t>(index)].second, end = std::min(matrix.n, begin + step);
    const uint8_t* codes = matrix.codes + begin * call.row_bytes;
    // Rows from here on cannot be read up to `padded` bytes: they are copied first.
    const int64_t slack = padded - call.row_bytes;
    const int64_t whole = std::clamp((matrix.n * call.row_bytes - slack) / call.row_bytes, begin, end);
    if (few) {
      uint32_t acc[4 * kDecodedRows];
      std::vector<uint8_t> copy(whole < end ? static_cast<size_t>(padded) : 0);
      for (int64_t r = begin; r < end;) {
        int64_t count = std::min(kDecodedRows, whole - r);
        const uint8_t* source = codes + (r - begin) * call.row_bytes;
        if (count <= 0) {
          count = 1;
          std::memcpy(copy.data(), source, static_cast<size_t>(call.row_bytes));
          source = copy.data();
        }
        for (int64_t token = 0; token < m; token += 4) {
          const int tokens = static_cast<int>(std::min<int64_t>(4, m - token));
          kernels.rows[code](x + token * length, length, tokens, source, call.row_bytes, padded, count, acc, kDecodedRows);
          for (int i = 0; i < tokens; i++) put(matrix, token + i, r, count, acc + i * kDecodedRows);
        }
        r += count;
      }
      return;
    }
    const int64_t count = end - begin, chunk = std::max(block, kUnpackedLength / planes / block * block);
    std::vector<uint8_t> copy(static_cast<size_t>(padded));
    std::vector<uint8_t> unpacked(static_cast<size_t>(count * std::min(chunk, padded) * planes));
    std::vector<uint32_t> acc(static_cast<size_t>(std::min(m, kTokenBlock) * count));
    for (int64_t token = 0; token < m; token += kTokenBlock) {
      const int64_t tokens = std::min(kTokenBlock, m - token);
      std::fill(acc.begin(), acc.end(), 0);
      for (int64_t from = 0; from < padded; from += chunk) {
        const int64_t to = std::min(padded, from + chunk), width = (to - from) * planes;
        for (int64_t r = begin; r < end; r++) {
          const uint8_t* source = codes + (r - begin) * call.row_bytes;
          if (r >= whole) {
            std::memcpy(copy.data(), source, static_cast<size_t>(call.row_bytes));
            source = copy.data();
          }
          for (int64_t b = from; b < to; b += block) {
            kernels.unpack[code](source + b, std::min(block, to - b), unpacked.data() + (r - begin) * width + (b - from) * planes);
          }
        }
        kernels.tile(x + token * length + from * planes, length, tokens, unpacked.data(), width, count, width, acc.data(), count);
      }
      for (int64_t i = 0; i < tokens; i++) put(matrix, token + i, begin, count, acc.data() + i * count);
    }
  });
}

}  // namespace bitnet
