// Random numbers from a counter: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011). The same number for the same seed
// and place, whichever thread asks.
#pragma once

#include "device.cuh"

namespace balora {

struct Words {
  uint32_t word[4];
};

__device__ inline Words philox(uint64_t place, uint32_t row, uint32_t stream, uint64_t seed) {
  uint32_t c[4] = {uint32_t(place), uint32_t(place >> 32), row, stream};
  uint32_t k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    c[0] = uint32_t(b >> 32) ^ c[1] ^ k[0];
    c[1] = uint32_t(b);
    c[2] = uint32_t(a >> 32) ^ c[3] ^ k[1];
    c[3] = uint32_t(a);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// The sketch's matrix Omega [n, l] has entries (2 b - 255)/256 with a random byte b: exact in every type that a tensor
// core takes, and any distribution with independent entries, mean 0 and bounded tails will do. One call gives the
// entries of 8 columns of A in two rows: l and l + 8.
__device__ inline Words omega_bytes(int64_t column, int l, uint64_t seed) {
  return philox(uint64_t(column) >> 3, uint32_t(l), 0, seed);
}

__device__ inline float omega_entry(uint32_t bytes, int i) {
  const uint32_t b = bytes >> (8 * i) & 0xff;
  return (bits_to_float(0x4b000000u | 2 * b) - 8388863.0f) * 0x1p-8f;  // 2^23 + 2 b - (2^23 + 255)
}

// 16 bytes of a row of Omega as fragments want them: 8 entries of half precision, or 4 floats, from `column` on.
template <class T>
__device__ inline void omega_row(uint32_t (&words)[4], const Words& random, int half, int64_t column) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = float_to_bits(omega_entry(column & 4 ? random.word[2 * half + 1] : random.word[2 * half], i));
    } else {
      const uint32_t bytes = random.word[2 * half + i / 2];
      const uint32_t one = rounded<T>(omega_entry(bytes, 2 * i % 4)).bits;
      const uint32_t two = rounded<T>(omega_entry(bytes, 2 * i % 4 + 1)).bits;
      words[i] = one | two << 16;
    }
  }
}

// For directions that a matrix does not have: uniform in (-1, 1).
__device__ inline float noise(int64_t position, int row, uint64_t seed) {
  return int32_t(philox(uint64_t(position), uint32_t(row), 1, seed).word[0]) * 0x1p-31f;
}

}  // namespace balora
