// out = multiple Z + U diag(weights) Vh: the gradient of a ratio of singular values to the norm, written in the one pass
// over Z that it takes.
#include <type_traits>

#include "kernels.cuh"

namespace balora {
namespace {

constexpr int ROWS = 32;  // of a block; a thread has one column of them

template <class T>
__global__ void __launch_bounds__(THREADS) update(Matrices z, int k, const float* u, const float* weights,
                                                  const float* vh, const float* multiple, T* out) {
  float* left = reinterpret_cast<float*>(shared_memory());  // [ROWS, k]: U diag(weights)
  const int64_t across = (z.n + THREADS - 1) / THREADS, down = (z.m + ROWS - 1) / ROWS;
  const int64_t matrix = blockIdx.x / (across * down), row0 = blockIdx.x / across % down * ROWS;
  const int64_t column = blockIdx.x % across * THREADS + threadIdx.x;
  for (int i = threadIdx.x; i < ROWS * k; i += THREADS) {
    const int64_t row = row0 + i / k;
    left[i] = row < z.m ? u[(matrix * z.m + row) * k + i % k] * weights[matrix * k + i % k] : 0.0f;
  }
  barrier();
  if (column >= z.n) return;
  float sums[ROWS] = {};
  for (int j = 0; j < k; ++j) {
    const float v = vh[(matrix * k + j) * z.n + column];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) sums[i] += left[i * k + j] * v;
  }
  const T* from = static_cast<const T*>(z.data) + matrix * z.batch_stride + row0 * z.row_stride + column;
  out += (matrix * z.m + row0) * z.n + column;
  const float times = multiple[matrix];
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
    if (row0 + i < z.m) out[i * z.n] = rounded<T>(times * to_float(from[i * z.row_stride]) + sums[i]);
}

}  // namespace

cudaError_t low_rank_update(const Matrices& z, int k, const float* u, const float* weights, const float* vh,
                            const float* multiple, void* out, cudaStream_t stream) {
  if (k < 1 || z.batch < 0 || z.m < 1 || z.n < 1) return cudaErrorInvalidValue;
  const int64_t blocks = z.batch * divide_up(z.m, ROWS) * divide_up(z.n, THREADS);
  return with_type(z.type, [&](auto kind) {
    using T = decltype(kind);
    return launch(update<T>, blocks, THREADS, ROWS * k * sizeof(float), stream, z, k, u, weights, vh, multiple,
                  static_cast<T*>(out));
  });
}

}  // namespace balora
