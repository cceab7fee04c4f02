// int8 activations times packed ternary weights, for any instruction set. The bytes are those of kernels_pallas/packing.py.
#pragma once

#include <algorithm>
#include <cmath>
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

// Of a number that is not NaN.
inline uint16_t RoundedToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value == value ? RoundedToBfloat16(value) : static_cast<uint16_t>(bits >> 16 | 0x40);
}

// For up to this many tokens a row is decoded while it is multiplied, once for every group; for more it pays to unpack rows first.
constexpr int64_t kFewTokens[2] = {16, 4};  // by encoding
constexpr int64_t kDecodedRows = 16;       // which stay in the nearest cache until all tokens have met them
// Of a task's rows so many are unpacked at once, over so many features, that they stay in the nearest cache, 16 KiB, until so many tokens,
// 256 KiB in the next one, have met them.
constexpr int64_t kUnpackedRows = 8, kUnpackedLength = 2048, kTokenBlock = 128;

// One row of activations in the order in which kernels meet the packed bytes, a vector of `width` bytes every `stride` bytes. Zeros stand
// where no input feature is. Returns the sum of the row.
inline int32_t Arrange(const int8_t* x, int64_t k, int64_t planes, int64_t run, int64_t row_bytes, int64_t padded, int64_t width,
                       int64_t stride, int8_t* out) {
  for (int64_t begin = 0; begin < padded; begin += width) {
    for (int64_t p = 0; p < planes; p++, out += stride) {
      const int64_t first = begin / run * run, feature = first * planes + p * run + (begin - first);
      if (begin + width <= std::min(first + run, row_bytes) && feature + width <= k) {
        for (int64_t b = 0; b < width; b += 16) std::memcpy(out + b, x + feature + b, 16);
        continue;
      }
      std::memset(out, 0, static_cast<size_t>(width));
      for (int64_t j = begin; j < std::min(begin + width, row_bytes);) {
        const int64_t start = j / run * run, length = std::min({start + run, row_bytes, begin + width}) - j;
        const int64_t from = start * planes + p * run + (j - start);
        if (from < k) std::memcpy(out + (j - begin), x + from, static_cast<size_t>(std::min(length, k - from)));
        j += length;
      }
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
  const int64_t padded = RoundUp(call.row_bytes, kRowStep), length = padded * planes, m = call.m, width = kernels.width;

  std::unique_ptr<int8_t, decltype(&std::free)> arranged(static_cast<int8_t*>(std::aligned_alloc(64, static_cast<size_t>(m * length))),
                                                         &std::free);
  if (!arranged) throw std::bad_alloc();
  std::vector<int32_t> sums(static_cast<size_t>(m));
  const int8_t* x = arranged.get();  // the group of token i, the first of it, begins at x + i * length
  ParallelFor(pool, m < 8 ? 1 : threads, (m + kGroup - 1) / kGroup, [&](int64_t g) {
    const int64_t begin = g * kGroup, tokens = std::min<int64_t>(kGroup, m - begin);
    for (int64_t i = 0; i < tokens; i++) {
      sums[static_cast<size_t>(begin + i)] = Arrange(call.x + (begin + i) * call.k, call.k, planes, run, call.row_bytes, padded, width,
                                                     tokens * width, arranged.get() + begin * length + i * width);
    }
  });

  // Blocks of rows: long enough to be a stream, and enough of them that threads end together.
  const bool few = m <= kFewTokens[code];
  int64_t rows = 0;
  for (const Matrix& matrix : call.matrices) rows += matrix.n;
  const int64_t work = rows * length * m;
  if (work < 1 << 18) threads = 1;  // waking a thread takes as long
  const int64_t step = !few ? kTaskRows : threads == 1 ? rows : std::max<int64_t>(8, RoundUp(rows / (threads * 32), 8));
  std::vector<std::pair<const Matrix*, int64_t>> blocks;
  for (const Matrix& matrix : call.matrices) {
    for (int64_t begin = 0; begin < matrix.n; begin += step) blocks.emplace_back(&matrix, begin);
  }

  const auto put = [&](const Matrix& matrix, int64_t token, int64_t begin, int64_t count, const uint32_t* acc) {
    const float scale = call.x_scale[token] * matrix.scale;
    const uint32_t offset = static_cast<uint32_t>(sums[static_cast<size_t>(token)]);  // codes are one more than weights
    const int64_t place = token * matrix.n + begin;
    const auto value = [&](int64_t r) { return static_cast<float>(static_cast<int32_t>(acc[r] - offset)) * scale; };
    uint16_t* narrow = static_cast<uint16_t*>(matrix.out) + place;
    if (!call.bfloat16) {
      for (int64_t r = 0; r < count; r++) static_cast<float*>(matrix.out)[place + r] = value(r);
    } else if (std::isfinite(scale)) {  // then no result is NaN, and the loop has no branches
      for (int64_t r = 0; r < count; r++) narrow[r] = RoundedToBfloat16(value(r));
    } else {
      for (int64_t r = 0; r < count; r++) narrow[r] = ToBfloat16(value(r));
    }
  };

  ParallelFor(pool, threads, static_cast<int64_t>(blocks.size()), [&](int64_t index) {
    const Matrix& matrix = *blocks[static_cast<size_t>(index)].first;
    const int64_t begin = blocks[static_cast<size_t>(index)].second, end = std::min(matrix.n, begin + step);
    // Rows from here on cannot be read up to `padded` bytes: they are copied first.
    const int64_t slack = padded - call.row_bytes;
    const int64_t whole = std::clamp((matrix.n * call.row_bytes - slack) / call.row_bytes, begin, end);
    std::vector<uint8_t> copy(whole < end ? static_cast<size_t>(padded) : 0);
    const auto row = [&](int64_t r) {
      const uint8_t* source = matrix.codes + r * call.row_bytes;
      return r < whole ? source : static_cast<const uint8_t*>(std::memcpy(copy.data(), source, static_cast<size_t>(call.row_bytes)));
    };
    if (few) {
      uint32_t acc[kGroup * kDecodedRows];
      for (int64_t r = begin; r < end;) {
        const int64_t count = r < whole ? std::min(kDecodedRows, whole - r) : 1;
        const uint8_t* source = row(r);
        for (int64_t token = 0; token < m; token += kGroup) {
          const int tokens = static_cast<int>(std::min<int64_t>(kGroup, m - token));
          kernels.rows[code](x + token * length, tokens, source, call.row_bytes, padded, count, acc, kDecodedRows);
          for (int i = 0; i < tokens; i++) put(matrix, token + i, r, count, acc + i * kDecodedRows);
        }
        r += count;
      }
      return;
    }
    // Parts of a row, as equal as they can be, that a tile may sum and that fit into the cache.
    const int64_t most = kernels.limit ? std::min(kernels.limit, kUnpackedLength / width) : kUnpackedLength / width;
    const int64_t parts = (length / width + most / planes * planes - 1) / (most / planes * planes);
    const int64_t part = (padded / width + parts - 1) / parts * width;  // packed bytes
    std::vector<uint8_t> unpacked(static_cast<size_t>(kUnpackedRows * part * planes + 63));
    uint8_t* panels = reinterpret_cast<uint8_t*>(RoundUp(reinterpret_cast<intptr_t>(unpacked.data()), 64));
    std::vector<uint32_t> acc(static_cast<size_t>(std::min(m, kTokenBlock) * kTaskRows));
    for (int64_t first = 0; first < m; first += kTokenBlock) {
      const int64_t last = std::min(first + kTokenBlock, m);
      std::fill(acc.begin(), acc.end(), 0);
      for (int64_t from = 0; from < padded; from += part) {
        const int64_t bytes = std::min(part, padded - from), vectors = bytes / width * planes;
        for (int64_t r = begin; r < end; r += kUnpackedRows) {
          const int64_t count = std::min(kUnpackedRows, end - r);
          for (int64_t i = 0; i < count; i++) {
            uint8_t* panel = panels + i / kernels.panel * kernels.panel * vectors * width;
            kernels.unpack[code](row(r + i) + from, bytes, kUnpackedRows * call.row_bytes, i % kernels.panel, panel);
          }
          for (int64_t token = first; token < last; token += kGroup) {
            const int64_t tokens = std::min<int64_t>(kGroup, m - token);
            uint32_t* to = acc.data() + (token - first) * kTaskRows + (r - begin);
            kernels.tile[code](x + token * length + from * planes * tokens, static_cast<int>(tokens), panels,
                               (count + kernels.panel - 1) / kernels.panel, bytes / width, to);
          }
        }
      }
      for (int64_t i = first; i < last; i++) put(matrix, i, begin, end - begin, acc.data() + (i - first) * kTaskRows);
    }
  });
}

}  // namespace bitnet
