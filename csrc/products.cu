// The products with A, on tensor cores: Y = A X and P = Aᵀ X, and the sketch Y = A Omega. A is read once, by 16 bytes
// a thread straight into the fragments: a sum may run over its index in any order, so each thread takes the columns
// (or rows) that lie next to each other in memory for those that the fragment's layout would have it take.
//
// X has the precision of float: of half-precision A two parts of X are multiplied, of float A three products of tf32
// parts are summed.

#include "kernels.cuh"
#include "random.cuh"

namespace balora {
namespace {

constexpr int ROWS = 32;           // of A that a warp multiplies by X
constexpr int64_t BLOCKS = 1056;   // 8 for each of an H100's multiprocessors: enough to even out, few partial sums
// Blocks that a multiprocessor holds, and the steps of the sum that a warp reads at once: as the registers allow.
template <int L>
constexpr int RESIDENT = L <= 16 ? 3 : 2;
template <int L>
constexpr int AHEAD = L <= 16 ? 2 : 1;
constexpr int64_t SHORTEST = 256;  // entries of a sum: below, its partial results weigh more than A
constexpr int64_t LONGEST = 2048;  // above, what tensor cores cut off may show

template <class T>
constexpr int VECTOR = 16 / sizeof(T);

// 16 bytes from p, zero from `left` entries on.
template <class T>
__device__ inline void load(uint32_t (&words)[4], const T* p, int64_t left, bool aligned) {
  if (aligned && left >= VECTOR<T>) {
    const uint4 all = *reinterpret_cast<const uint4*>(p);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    return;
  }
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  const Bits* bits = reinterpret_cast<const Bits*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    constexpr int EACH = 4 / sizeof(T);
    words[i] = i * EACH < left ? bits[i * EACH] : 0;
    if (EACH == 2 && i * EACH + 1 < left) words[i] |= uint32_t(bits[i * EACH + 1]) << 16;
  }
}

template <class T>
__device__ inline double squares_of(const uint32_t (&words)[4]) {
  double sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      const double x = bits_to_float(words[i]);
      sum += x * x;
    } else {
      const double x = to_float(T{uint16_t(words[i])}), y = to_float(T{uint16_t(words[i] >> 16)});
      sum += x * x + y * y;
    }
  }
  return sum;
}

// The fragment of X and the rest that its type cannot hold, from words of rows l and l + 8.
struct Fragment {
  uint32_t high[4], low[4];
};
__device__ inline void split(uint32_t word, uint32_t& high, uint32_t& low) {
  high = to_tf32(bits_to_float(word));
  low = to_tf32(bits_to_float(word) - bits_to_float(high));
}

// d += X A for one step of the sum and `TILES` tiles of 8 columns. Tensor cores cut their sums off where others round;
// over many steps that adds up. So they begin each step at zero, the small terms first, and d is added to outside of
// them (Ootomo and Yokota, 2022); not where registers are short, with 64 columns of half precision.
template <class T, int L>
constexpr bool INSIDE = L == 64 && sizeof(T) == 2;

template <class T, int L, bool EXACT, int TILES>
__device__ inline void accumulate(float (&d)[TILES][4], const Fragment& x, const uint32_t (&b)[TILES][2]) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    if constexpr (INSIDE<T, L>) {
      if constexpr (!EXACT) mma(T(), d[i], x.low, b[i]);
      mma(T(), d[i], x.high, b[i]);
      continue;
    }
    float step[4] = {};
    if constexpr (sizeof(T) == 4) {
      uint32_t high[2], low[2];
      split(b[i][0], high[0], low[0]);
      split(b[i][1], high[1], low[1]);
      mma(T(), step, x.high, low);
      if constexpr (!EXACT) mma(T(), step, x.low, high);
      mma(T(), step, x.high, high);
    } else {
      if constexpr (!EXACT) mma(T(), step, x.low, b[i]);
      mma(T(), step, x.high, b[i]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) d[i][j] += step[j];
  }
}

// Y = A X as rows, [L, m]. A warp has 32 rows of A, a block 128; the sum runs over columns.
template <class T, int L, bool SKETCH>
__global__ void __launch_bounds__(THREADS, RESIDENT<L>) times(Matrices a, int64_t first, Cut cut, const T* operand,
                                                              uint64_t seed, float* partial, double* squares,
                                                              bool aligned) {
  constexpr int CHUNK = 4 * VECTOR<T>;  // columns that the four threads of a row take at once
  constexpr int TILES = ROWS / 8;
  const int64_t slice = blockIdx.x % cut.slices, tile = blockIdx.x / cut.slices % cut.tiles;
  const int64_t matrix = blockIdx.x / (cut.slices * cut.tiles);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int64_t row0 = (tile * WARPS + warp) * ROWS;
  const int64_t x_stride = (a.n + 63) / 64 * 64, stride = (a.m + 63) / 64 * 64;
  const T* entries = static_cast<const T*>(a.data) + (first + matrix) * a.batch_stride + (row0 + g) * a.row_stride;
  const T* x = SKETCH ? nullptr : operand + matrix * (sizeof(T) == 2 ? 2 : 1) * L * x_stride;
  const int64_t begin = slice * cut.step, end = begin + cut.step < a.n ? begin + cut.step : a.n;

  float d[L / 16][TILES][4] = {};
  double sum = 0;
  for (int64_t from = begin; from < end; from += AHEAD<L> * CHUNK) {
    uint32_t b[AHEAD<L>][TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
#pragma unroll
      for (int u = 0; u < AHEAD<L>; ++u) {
        const int64_t column = from + u * CHUNK + q * VECTOR<T>;
        load(b[u][i], entries + 8 * i * a.row_stride + column, row0 + 8 * i + g < a.m ? a.n - column : 0, aligned);
      }
    }
#pragma unroll
    for (int u = 0; u < AHEAD<L>; ++u) {
      const int64_t column = from + u * CHUNK + q * VECTOR<T>;
      if constexpr (SKETCH) {
#pragma unroll
        for (int i = 0; i < TILES; ++i) sum += squares_of<T>(b[u][i]);
      }
#pragma unroll
      for (int block = 0; block < L / 16; ++block) {
        const int l = 16 * block + g;
        uint32_t above[4], below[4], above_low[4] = {}, below_low[4] = {};
        if constexpr (SKETCH) {
          const Words random = omega_bytes(column, l, seed);
          omega_row<T>(above, random, 0, column);
          omega_row<T>(below, random, 1, column);
        } else {
          load(above, x + l * x_stride + column, CHUNK, true);
          load(below, x + (l + 8) * x_stride + column, CHUNK, true);
          if constexpr (sizeof(T) == 2) {
            load(above_low, x + (L + l) * x_stride + column, CHUNK, true);
            load(below_low, x + (L + l + 8) * x_stride + column, CHUNK, true);
          }
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          Fragment fragment = {{above[2 * s], below[2 * s], above[2 * s + 1], below[2 * s + 1]},
                               {above_low[2 * s], below_low[2 * s], above_low[2 * s + 1], below_low[2 * s + 1]}};
          if constexpr (sizeof(T) == 4 && !SKETCH) {
#pragma unroll
            for (int i = 0; i < 4; ++i) split(fragment.high[i], fragment.high[i], fragment.low[i]);
          }
          uint32_t now[TILES][2];
#pragma unroll
          for (int i = 0; i < TILES; ++i) now[i][0] = b[u][i][2 * s], now[i][1] = b[u][i][2 * s + 1];
          accumulate<T, L, SKETCH>(d[block], fragment, now);
        }
      }
    }
  }

  float* out = partial + (matrix * cut.slices + slice) * L * stride;
#pragma unroll
  for (int block = 0; block < L / 16; ++block) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int64_t row = row0 + 8 * i + 2 * q;
      if (row < stride) {
        const int64_t l = 16 * block + g;
        *reinterpret_cast<float2*>(out + l * stride + row) = {d[block][i][0], d[block][i][1]};
        *reinterpret_cast<float2*>(out + (l + 8) * stride + row) = {d[block][i][2], d[block][i][3]};
      }
    }
  }
  if constexpr (SKETCH) {
    double* sums = reinterpret_cast<double*>(shared_memory());
    sums[threadIdx.x] = sum;
    barrier();
    if (threadIdx.x == 0) {
      for (int i = 1; i < THREADS; ++i) sum += sums[i];
      squares[blockIdx.x] = sum;
    }
  }
}

// squares [batch] from the sums of the sketch's blocks.
__global__ void __launch_bounds__(THREADS) add_squares(const double* sums, int64_t parts, int64_t batch,
                                                       double* squares) {
  const int64_t matrix = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (matrix >= batch) return;
  double sum = 0;
  for (int64_t i = 0; i < parts; ++i) sum += sums[matrix * parts + i];
  squares[matrix] = sum - sum == 0 ? sum : NAN;
}

// P = Aᵀ X as rows, [L, n]. A warp has 128 bytes of a row of A, a block 512; the sum runs over rows.
template <class T, int L>
__global__ void __launch_bounds__(THREADS, RESIDENT<L>) transposed_times(Matrices a, int64_t first, Cut cut,
                                                                         const T* operand, float* partial,
                                                                         bool aligned) {
  constexpr int EACH = 4 / sizeof(T);  // entries of a word
  constexpr int TILES = VECTOR<T>;
  const int64_t slice = blockIdx.x % cut.slices, tile = blockIdx.x / cut.slices % cut.tiles;
  const int64_t matrix = blockIdx.x / (cut.slices * cut.tiles);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int64_t column0 = (tile * WARPS + warp) * 8 * TILES, column = column0 + g * TILES;
  const int64_t x_stride = (a.m + 63) / 64 * 64, stride = (a.n + 63) / 64 * 64;
  const T* entries = static_cast<const T*>(a.data) + (first + matrix) * a.batch_stride + column;
  const T* x = operand + matrix * (sizeof(T) == 2 ? 2 : 1) * L * x_stride;
  const int64_t begin = slice * cut.step, end = begin + cut.step < a.m ? begin + cut.step : a.m;

  float d[L / 16][TILES][4] = {};
#pragma unroll (AHEAD<L>)
  for (int64_t from = begin; from < end; from += 8 * EACH) {
    const int64_t row = from + 2 * EACH * q;
    uint32_t rows[2 * EACH][4];
#pragma unroll
    for (int i = 0; i < 2 * EACH; ++i)
      load(rows[i], entries + (row + i) * a.row_stride, row + i < a.m ? a.n - column : 0, aligned);
    uint32_t b[TILES][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (EACH == 1) {
          b[i][half] = rows[half][i];
        } else {  // two rows side by side, so that entries of a column become neighbours
          const uint32_t one = rows[2 * half][i], two = rows[2 * half + 1][i];
          b[2 * i][half] = (one & 0xffff) | two << 16;
          b[2 * i + 1][half] = one >> 16 | (two & 0xffff0000);
        }
      }
    }
#pragma unroll
    for (int block = 0; block < L / 16; ++block) {
      const T* at = x + (16 * block + g) * x_stride + row;
      const uint2 above = *reinterpret_cast<const uint2*>(at);
      const uint2 below = *reinterpret_cast<const uint2*>(at + 8 * x_stride);
      Fragment fragment = {{above.x, below.x, above.y, below.y}, {}};
      if constexpr (sizeof(T) == 2) {
        const uint2 above_low = *reinterpret_cast<const uint2*>(at + L * x_stride);
        const uint2 below_low = *reinterpret_cast<const uint2*>(at + (L + 8) * x_stride);
        fragment.low[0] = above_low.x, fragment.low[1] = below_low.x;
        fragment.low[2] = above_low.y, fragment.low[3] = below_low.y;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) split(fragment.high[i], fragment.high[i], fragment.low[i]);
      }
      accumulate<T, L, false>(d[block], fragment, b);
    }
  }

  float* out = partial + (matrix * cut.slices + slice) * L * stride;
#pragma unroll
  for (int block = 0; block < L / 16; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = column0 + (2 * q + i % 2) * TILES, l = 16 * block + g + 8 * (i / 2);
      if (at < stride) {
#pragma unroll
        for (int t = 0; t < TILES; t += 4)
          *reinterpret_cast<float4*>(out + l * stride + at + t) = {d[block][t][i], d[block][t + 1][i],
                                                                   d[block][t + 2][i], d[block][t + 3][i]};
      }
    }
  }
}

bool is_aligned(const Matrices& a) {
  const int64_t vector = 16 / item_size(a.type);
  return reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && a.row_stride % vector == 0 && a.batch_stride % vector == 0;
}

}  // namespace

Cut cut(const Matrices& a, bool transposed, int64_t batch) {
  const int64_t tile = transposed ? WARPS * 128 / item_size(a.type) : WARPS * ROWS;
  const int64_t tiles = divide_up(transposed ? a.n : a.m, tile), length = transposed ? a.m : a.n;
  const int64_t wanted = divide_up(BLOCKS, batch * tiles), most = divide_up(length, SHORTEST);
  const int64_t even = round_up(divide_up(length, wanted < most ? wanted : most), 64);
  const int64_t step = even < LONGEST ? even : LONGEST;
  return {tiles, divide_up(length, step), step};
}

cudaError_t sketch(const Matrices& a, int64_t first, int64_t batch, int L, const Cut& cut, uint64_t seed,
                   float* partial, double* sums, double* squares, cudaStream_t stream) {
  const int64_t parts = cut.tiles * cut.slices;
  const cudaError_t error = with_type(a.type, [&](auto type) {
    using T = decltype(type);
    return with_rows(L, [&](auto rows) {
      return launch(times<T, decltype(rows)::value, true>, batch * parts, THREADS, THREADS * sizeof(double), stream, a,
                    first, cut, static_cast<const T*>(nullptr), seed, partial, sums, is_aligned(a));
    });
  });
  if (error != cudaSuccess) return error;
  return launch(add_squares, divide_up(batch, THREADS), THREADS, 0, stream, sums, parts, batch, squares);
}

cudaError_t multiply(const Matrices& a, int64_t first, int64_t batch, bool transposed, int L, const Cut& cut,
                     const void* operand, float* partial, cudaStream_t stream) {
  const int64_t blocks = batch * cut.tiles * cut.slices;
  return with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(operand);
    return with_rows(L, [&](auto rows) {
      constexpr int ROWS_OF_X = decltype(rows)::value;
      if (transposed)
        return launch(transposed_times<T, ROWS_OF_X>, blocks, THREADS, 0, stream, a, first, cut, x, partial,
                      is_aligned(a));
      return launch(times<T, ROWS_OF_X, false>, blocks, THREADS, 0, stream, a, first, cut, x, uint64_t(0), partial,
                    static_cast<double*>(nullptr), is_aligned(a));
    });
  });
}

}  // namespace balora
