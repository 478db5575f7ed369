// Orthonormal columns by CholeskyQR in mixed precision (Yamazaki, Tomov and Dongarra, 2015): the panel is float, its Gram
// matrix, the factor and the solution double. So one pass does for a condition up to 1e6, where CholeskyQR in float
// needs a shift and three.
//
// A column that depends on those before it, up to the rounding of the products that made it, is replaced by random
// numbers: a sketch of a matrix of low rank has such columns, and U and V must be orthonormal all the same. The next
// pass makes the replacement orthogonal to the others. A panel with an entry that is not finite becomes NaN.

#include "kernels.cuh"
#include "random.cuh"

namespace balora {
namespace {

constexpr int TILE = 64;            // entries of the panel's rows that a block holds at a time
constexpr int WIDE = 512;            // threads that factor a matrix
constexpr double DEPENDENT = 1e-12;  // of a column's square that is left: 1e-6 of its length

// sum += COUNT slices at a time, while there are as many: all are on their way before the first is added.
template <int COUNT>
__device__ inline void add_next(float& sum, const float*& from, int64_t& slices, int64_t size) {
#pragma unroll 1
  for (; slices >= COUNT; slices -= COUNT, from += COUNT * size) {
    float x[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = from[i * size];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += x[i];
  }
}

// panel = scale * (sum of the slices). One entry a thread: a short panel has few. The bound of 8 blocks leaves a thread
// the registers for 16 loads at once.
__global__ void __launch_bounds__(THREADS, 8) gather_kernel(const float* partial, int64_t slices, float scale,
                                                            float* panel, unsigned tiles) {
  const int64_t size = int64_t(tiles) * THREADS;  // of a panel
  partial += blockIdx.x / tiles * slices * size + int64_t(blockIdx.x % tiles) * THREADS + threadIdx.x;
  float sum = 0;
  add_next<16>(sum, partial, slices, size);
  add_next<4>(sum, partial, slices, size);
  add_next<1>(sum, partial, slices, size);
  panel[int64_t(blockIdx.x) * THREADS + threadIdx.x] = sum * scale;
}

// The Gram matrix of the panel's rows, over this block's part of the length.
template <int L>
__global__ void __launch_bounds__(THREADS) gram_kernel(const float* panel, Panel shape, int64_t blocks,
                                                       double* grams) {
  constexpr int APART = THREADS / TILE;  // rows of a thread in the tile
  constexpr int ACROSS = L / 16, DOWN = L / 8, PITCH = TILE + 1;  // 8 x 16 threads, each with DOWN x ACROSS pairs of rows
  double* tile = reinterpret_cast<double*>(shared_memory());  // [L, TILE], a column of padding
  const int64_t matrix = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t each = (shape.stride / TILE + blocks - 1) / blocks * TILE;
  const int64_t end = (block + 1) * each < shape.stride ? (block + 1) * each : shape.stride;
  panel += matrix * L * shape.stride;
  const int one = threadIdx.x / 16, two = threadIdx.x % 16;
  const int row0 = threadIdx.x / TILE, column0 = threadIdx.x % TILE;
  float next[L / APART];  // this thread's entries of a tile, on their way while the one before it is summed
  const auto fetch = [&](int64_t begin) {
#pragma unroll
    for (int i = 0; i < L / APART && begin < end; ++i)
      next[i] = panel[(row0 + i * APART) * shape.stride + begin + column0];
  };
  double sums[DOWN][ACROSS] = {};
  fetch(block * each);
  for (int64_t begin = block * each; begin < end; begin += TILE) {
#pragma unroll
    for (int i = 0; i < L / APART; ++i) tile[(row0 + i * APART) * PITCH + column0] = next[i];
    barrier();
    fetch(begin + TILE);
#pragma unroll 2
    for (int at = 0; at < TILE; ++at) {
      double column[ACROSS];
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) column[j] = tile[(two + 16 * j) * PITCH + at];
#pragma unroll
      for (int i = 0; i < DOWN; ++i) {
        const double row = tile[(one + 8 * i) * PITCH + at];
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) sums[i][j] += row * column[j];
      }
    }
    barrier();
  }
  grams += blockIdx.x * int64_t(L * L);
#pragma unroll
  for (int i = 0; i < DOWN; ++i) {
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) grams[(one + 8 * i) * L + two + 16 * j] = sums[i][j];
  }
}

// Cholesky with its inverse, in one elimination: g -> lower, the identity -> lower⁻¹. Of a dependent column both have
// zeros.
__global__ void __launch_bounds__(WIDE, 2) factor_kernel(const double* grams, int64_t blocks, int L, int width,
                                                      double* lower, double* inverse) {
  double* g = reinterpret_cast<double*>(shared_memory());  // [width, width]
  double* x = g + width * width;                           // [width, width]
  double* before = x + width * width;                      // [width]: the diagonal
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp has rows, its threads columns
  grams += blockIdx.x * blocks * L * L;
  bool broken = false;
  for (int row = warp; row < width; row += WIDE / 32) {
    for (int column = lane; column < width; column += 32) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += grams[(b * L + row) * L + column];
      g[row * width + column] = sum;
      x[row * width + column] = row == column;
      if (row == column) before[row] = sum;
      broken |= !(sum - sum == 0);
    }
  }
  broken = barrier_or(broken);
  for (int j = 0; j < width; ++j) {
    const double pivot = g[j * width + j];
    const double scale = pivot <= DEPENDENT * before[j] ? 0 : rsqrt(pivot);
    for (int row = j + 1 + warp; row < width; row += WIDE / 32) {
      const double factor = g[row * width + j] * scale;
      for (int column = lane; column <= row; column += 32) {
        if (column <= j)
          x[row * width + column] -= factor * (x[j * width + column] * scale);
        else
          g[row * width + column] -= factor * (g[column * width + j] * scale);
      }
    }
    barrier();
    for (int i = threadIdx.x; i < width; i += WIDE) {
      if (i >= j) g[i * width + j] *= scale;
      if (i <= j) x[j * width + i] *= scale;
    }
  }
  barrier();
  const int64_t at = blockIdx.x * int64_t(width) * width;
  for (int row = warp; row < width; row += WIDE / 32) {
    for (int column = lane; column < width; column += 32) {
      const int i = row * width + column;
      lower[at + i] = broken ? NAN : column <= row ? g[i] : 0;
      inverse[at + i] = broken ? NAN : column <= row ? x[i] : 0;
    }
  }
}

// panel = inverse panel, and its parts.
template <class T>
__global__ void __launch_bounds__(THREADS) apply_kernel(float* panel, int L, int width, Panel shape,
                                                        const double* inverse, T* operand, uint64_t seed) {
  double* factor = reinterpret_cast<double*>(shared_memory());          // [width, width]
  float* tile = reinterpret_cast<float*>(factor + width * width);      // [width, THREADS]
  const int64_t tiles = (shape.stride + THREADS - 1) / THREADS, matrix = blockIdx.x / tiles;
  const int64_t position = blockIdx.x % tiles * THREADS + threadIdx.x;
  panel += matrix * L * shape.stride + position;
  if (operand != nullptr) operand += matrix * 2 * L * shape.stride + position;
  for (int i = threadIdx.x; i < width * width; i += THREADS)
    factor[i] = inverse[matrix * int64_t(width) * width + i];
  const bool there = position < shape.stride, inside = position < shape.length;
  for (int i = 0; i < width && there; ++i) tile[i * THREADS + threadIdx.x] = panel[i * shape.stride];
  barrier();
  if (!there) return;
  for (int i = 0; i < L; ++i) {
    float y = 0;
    if (i < width && inside) {
      if (factor[i * width + i] == 0) {
        y = noise(position, i, seed) * rsqrtf(float(shape.length));
      } else {
        double sum = 0;
        for (int j = 0; j <= i; ++j) sum += factor[i * width + j] * tile[j * THREADS + threadIdx.x];
        y = float(sum);
      }
    }
    panel[i * shape.stride] = y;
    if constexpr (sizeof(T) == 2) {
      if (operand == nullptr) continue;
      const float scaled = y * part_scale<T>();
      const T high = rounded<T>(scaled);
      operand[i * shape.stride] = high;
      operand[(L + i) * shape.stride] = rounded<T>(scaled - to_float(high));
    }
  }
}

// out = the panel times turn.
__global__ void __launch_bounds__(THREADS) turn_kernel(const float* panel, int L, int width, int k, Panel shape,
                                                       const double* turn, bool as_rows, float* out) {
  double* by = reinterpret_cast<double*>(shared_memory());      // [k, width]
  float* tile = reinterpret_cast<float*>(by + k * width);       // [width, THREADS]
  const int64_t tiles = (shape.length + THREADS - 1) / THREADS, matrix = blockIdx.x / tiles;
  const int64_t position = blockIdx.x % tiles * THREADS + threadIdx.x;
  const bool inside = position < shape.length;
  for (int i = threadIdx.x; i < k * width; i += THREADS) by[i] = turn[matrix * int64_t(k) * width + i];
  for (int i = 0; i < width && inside; ++i)
    tile[i * THREADS + threadIdx.x] = panel[(matrix * L + i) * shape.stride + position];
  barrier();
  for (int j = 0; j < k && inside; ++j) {
    double sum = 0;
    for (int i = 0; i < width; ++i) sum += by[j * width + i] * tile[i * THREADS + threadIdx.x];
    const int64_t at = as_rows ? (matrix * k + j) * shape.length + position : (matrix * shape.length + position) * k + j;
    out[at] = float(sum);
  }
}

}  // namespace

cudaError_t gather(const float* partial, int64_t slices, float scale, float* panel, int64_t batch, int L,
                   const Panel& shape, cudaStream_t stream) {
  const int64_t tiles = L * shape.stride / THREADS;  // nothing is left: both have powers of two
  return launch(gather_kernel, batch * tiles, THREADS, 0, stream, partial, slices, scale, panel, tiles);
}

cudaError_t gram(const float* panel, int64_t batch, int L, const Panel& shape, int64_t blocks, double* grams,
                 cudaStream_t stream) {
  return with_rows(L, [&](auto rows) {
    constexpr int ROWS = decltype(rows)::value;
    return launch(gram_kernel<ROWS>, batch * blocks, THREADS, ROWS * (TILE + 1) * sizeof(double), stream, panel, shape,
                  blocks, grams);
  });
}

cudaError_t factor(const double* grams, int64_t blocks, int64_t batch, int L, int width, double* lower,
                   double* inverse, cudaStream_t stream) {
  const size_t shared = (2 * width * width + width) * sizeof(double);
  return launch(factor_kernel, batch, WIDE, shared, stream, grams, blocks, L, width, lower, inverse);
}

cudaError_t apply(float* panel, int64_t batch, int L, int width, const Panel& shape, const double* inverse, Type type,
                  void* operand, uint64_t seed, cudaStream_t stream) {
  const size_t shared = width * width * sizeof(double) + width * THREADS * sizeof(float);
  return with_type(type, [&](auto kind) {
    using T = decltype(kind);
    return launch(apply_kernel<T>, batch * divide_up(shape.stride, THREADS), THREADS, shared, stream, panel, L, width,
                  shape, inverse, static_cast<T*>(operand), seed);
  });
}

cudaError_t turn(const float* panel, int64_t batch, int L, int width, int k, const Panel& shape, const double* turn,
                 bool as_rows, float* out, cudaStream_t stream) {
  const size_t shared = k * width * sizeof(double) + width * THREADS * sizeof(float);
  return launch(turn_kernel, batch * divide_up(shape.length, THREADS), THREADS, shared, stream, panel, L, width, k,
                shape, turn, as_rows, out);
}

}  // namespace balora
