// out = multiple Z + U diag(weights) Vh: the gradient of a ratio of singular values to the norm, written in the one pass
// over Z that it takes.

#include "kernels.cuh"

namespace balora {
namespace {

constexpr int ROWS = 32;         // of a block; a thread has one column of them
constexpr int PITCH = ROWS + 4;  // of columns in shared memory, written one by one and read by 16 bytes

template <class T>
__global__ void __launch_bounds__(THREADS) update(Matrices z, int k, const float* u, const float* weights,
                                                  const float* vh, const float* multiple, T* out) {
  float* left = reinterpret_cast<float*>(shared_memory());  // [k, PITCH]: U diag(weights)
  const int64_t across = (z.n + THREADS - 1) / THREADS, down = (z.m + ROWS - 1) / ROWS;
  const int64_t matrix = blockIdx.x / (across * down), row0 = blockIdx.x / across % down * ROWS;
  const int64_t column = blockIdx.x % across * THREADS + threadIdx.x;
  // All of Z first: no load could pass a store to `out`, which the compiler must take for Z.
  const T* from = static_cast<const T*>(z.data) + matrix * z.batch_stride + row0 * z.row_stride + column;
  T entries[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) entries[i] = column < z.n && row0 + i < z.m ? from[i * z.row_stride] : T{};
  for (int i = threadIdx.x; i < ROWS * k; i += THREADS) {
    const int64_t row = row0 + i / k;
    const float x = row < z.m ? u[(matrix * z.m + row) * k + i % k] * weights[matrix * k + i % k] : 0.0f;
    left[i % k * PITCH + i / k] = x;
  }
  barrier();
  if (column >= z.n) return;
  float sums[ROWS] = {};
  for (int j = 0; j < k; ++j) {
    const float v = vh[(matrix * k + j) * z.n + column];
#pragma unroll
    for (int i = 0; i < ROWS; i += 4) {
      const float4 l = *reinterpret_cast<const float4*>(left + j * PITCH + i);
      sums[i] += l.x * v, sums[i + 1] += l.y * v, sums[i + 2] += l.z * v, sums[i + 3] += l.w * v;
    }
  }
  out += (matrix * z.m + row0) * z.n + column;
  const float times = multiple[matrix];
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
    if (row0 + i < z.m) out[i * z.n] = rounded<T>(times * to_float(entries[i]) + sums[i]);
}

}  // namespace

cudaError_t low_rank_update(const Matrices& z, int k, const float* u, const float* weights, const float* vh,
                            const float* multiple, void* out, cudaStream_t stream) {
  if (k < 1 || z.batch < 0 || z.m < 1 || z.n < 1) return cudaErrorInvalidValue;
  const int64_t blocks = z.batch * divide_up(z.m, ROWS) * divide_up(z.n, THREADS);
  return with_type(z.type, [&](auto kind) {
    using T = decltype(kind);
    return launch(update<T>, blocks, THREADS, k * PITCH * sizeof(float), stream, z, k, u, weights, vh, multiple,
                  static_cast<T*>(out));
  });
}

}  // namespace balora
