// Y = A (Aᵀ Q) with one reading of A, where the block's registers hold all of Y: m <= 512 rows, a sketch of up to 32
// columns, bf16. (fp16 has too few exponents for Aᵀ Q, of which nobody knows the size.)
//
// A block takes tiles of 64 columns of A, all rows: P = tileᵀ Q, and Y += tile P, both from shared memory, while the
// next tile is on its way. P is not made orthonormal in between; its columns keep their precision one by one, which is
// all that the factorization of Y asks for. A power of two near 1/||A|| keeps Y in the range that A has.

#include "kernels.cuh"

namespace balora {
namespace {

using T = BFloat16;
constexpr int BLOCK = 256;             // threads
constexpr int MOST_ROWS = 512;         // 64 for each warp
constexpr int COLUMNS = 64;            // of a tile
constexpr int PITCH = COLUMNS + 8;     // entries from row to row: keeps the banks apart, of halves and of floats
constexpr int64_t SPREAD = 264;        // blocks: two for each multiprocessor, one at a time

template <int L>
struct Shared {
  alignas(16) T tile[2][MOST_ROWS][PITCH];
  alignas(16) T parts[2][L][PITCH];                // of P
  alignas(16) float sums[BLOCK / 32][L][PITCH];    // of P, from each warp's rows
};

// Columns from `from` on, zero outside of A.
template <int L>
__device__ inline void fetch(Shared<L>& shared, int buffer, const Matrices& a, const T* entries, int64_t from) {
  for (int i = threadIdx.x; i < MOST_ROWS * COLUMNS / 8; i += BLOCK) {
    const int row = i / (COLUMNS / 8), part = i % (COLUMNS / 8) * 8;
    const int64_t left = row < a.m ? a.n - from - part : 0;
    const int bytes = left >= 8 ? 16 : left > 0 ? int(left) * 2 : 0;
    copy_async(&shared.tile[buffer][row][part], bytes > 0 ? entries + row * a.row_stride + from + part : entries, bytes);
  }
  copies_issued();
}

template <int L>
__global__ void __launch_bounds__(BLOCK, 1) iterate(Matrices a, int64_t first, int64_t slices, const T* operand,
                                                    const double* squares, float* partial) {
  Shared<L>& shared = *reinterpret_cast<Shared<L>*>(shared_memory());
  const int64_t matrix = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t stride = (a.m + 63) / 64 * 64, tiles = (a.n + COLUMNS - 1) / COLUMNS;
  const T* entries = static_cast<const T*>(a.data) + (first + matrix) * a.batch_stride;
  operand += matrix * 2 * L * stride;
  const int row0 = warp * 64;
  const bool works = row0 < stride;  // a warp whose rows are beyond A has no operand

  const double square = squares[matrix];
  const float scale = square > 0 ? exp2f(-rintf(float(log2(square)) / 2)) : 1.0f;  // NaN stays in the sums

  float y[L / 16][8][4] = {};
  fetch(shared, 0, a, entries, slice * COLUMNS);
  int buffer = 0;
  for (int64_t tile = slice; tile < tiles; tile += slices) {
    copies_done();
    barrier();
    if (tile + slices < tiles) fetch(shared, 1 - buffer, a, entries, (tile + slices) * COLUMNS);

    // P from this warp's rows.
    float p[L / 16][8][4] = {};
    for (int from = row0; from < row0 + 64 && works; from += 16) {
      uint32_t b[8][2];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        // Of two tiles of 8 columns the first 8 rows and the next 8: one row from each thread.
        uint32_t words[4];
        load_transposed(words, &shared.tile[buffer][from + lane % 16][pair * 16 + lane / 16 * 8]);
        b[2 * pair][0] = words[0], b[2 * pair][1] = words[1];
        b[2 * pair + 1][0] = words[2], b[2 * pair + 1][1] = words[3];
      }
#pragma unroll
      for (int block = 0; block < L / 16; ++block) {
        uint32_t x[2][4];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const T* at = operand + (part * L + 16 * block + g) * stride + from + 2 * q;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            x[part][i] = *reinterpret_cast<const uint32_t*>(at + i % 2 * 8 * stride + i / 2 * 8);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          mma(T(), p[block][i], x[1], b[i]);
          mma(T(), p[block][i], x[0], b[i]);
        }
      }
    }
#pragma unroll
    for (int block = 0; block < L / 16; ++block) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float* at = &shared.sums[warp][16 * block + g][8 * i + 2 * q];
        *reinterpret_cast<float2*>(at) = {p[block][i][0], p[block][i][1]};
        *reinterpret_cast<float2*>(at + 8 * PITCH) = {p[block][i][2], p[block][i][3]};
      }
    }
    barrier();
    for (int i = threadIdx.x; i < L * COLUMNS; i += BLOCK) {
      const int l = i / COLUMNS, column = i % COLUMNS;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < BLOCK / 32; ++w) sum += shared.sums[w][l][column];
      sum *= scale;
      const T high = rounded<T>(sum);
      shared.parts[0][l][column] = high;
      shared.parts[1][l][column] = rounded<T>(sum - to_float(high));
    }
    barrier();

    // Y of this warp's rows. The sum over columns in an order that keeps the banks apart: 16 bytes 2 q + u.
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int column = (2 * q + u) * 8;
      uint4 x[L / 16][2][2];
#pragma unroll
      for (int block = 0; block < L / 16; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[block][i / 2][i % 2] =
              *reinterpret_cast<const uint4*>(&shared.parts[i / 2][16 * block + g + 8 * (i % 2)][column]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint4 b = *reinterpret_cast<const uint4*>(&shared.tile[buffer][row0 + 8 * i + g][column]);
        const uint32_t one[2] = {b.x, b.y}, two[2] = {b.z, b.w};
#pragma unroll
        for (int block = 0; block < L / 16; ++block) {
#pragma unroll
          for (int part = 1; part >= 0; --part) {
            const uint4 above = x[block][part][0], below = x[block][part][1];
            const uint32_t s0[4] = {above.x, below.x, above.y, below.y}, s1[4] = {above.z, below.z, above.w, below.w};
            mma(T(), y[block][i], s0, one);
            mma(T(), y[block][i], s1, two);
          }
        }
      }
    }
    buffer = 1 - buffer;
  }

  float* out = partial + (matrix * slices + slice) * L * stride;
#pragma unroll
  for (int block = 0; block < L / 16; ++block) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = row0 + 8 * i + 2 * q, l = 16 * block + g;
      if (row < stride) {
        *reinterpret_cast<float2*>(out + l * stride + row) = {y[block][i][0], y[block][i][1]};
        *reinterpret_cast<float2*>(out + (l + 8) * stride + row) = {y[block][i][2], y[block][i][3]};
      }
    }
  }
}

}  // namespace

int64_t iteration_slices(const Matrices& a, int L, int64_t batch) {
  const size_t shared = L == 16 ? sizeof(Shared<16>) : sizeof(Shared<32>);
  const bool aligned = reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && a.row_stride % 8 == 0 && a.batch_stride % 8 == 0;
  // Fewer rows would leave most warps without work: A fits the caches then anyway.
  if (a.type != Type::bfloat16 || L > 32 || a.m > MOST_ROWS || a.m <= MOST_ROWS / 4 || !aligned ||
      shared > most_shared_memory())
    return 0;
  const int64_t wanted = divide_up(SPREAD, batch), tiles = divide_up(a.n, COLUMNS);
  return wanted < tiles ? wanted : tiles;
}

cudaError_t iterate_once(const Matrices& a, int64_t first, int64_t batch, int L, int64_t slices, const void* operand,
                         const double* squares, float* partial, cudaStream_t stream) {
  const T* x = static_cast<const T*>(operand);
  if (L == 16)
    return launch(iterate<16>, batch * slices, BLOCK, sizeof(Shared<16>), stream, a, first, slices, x, squares, partial);
  return launch(iterate<32>, batch * slices, BLOCK, sizeof(Shared<32>), stream, a, first, slices, x, squares, partial);
}

}  // namespace balora
