// The CUDA kernels' interface: pointers, sizes and a stream. No header of torch.
//
// Everything is enqueued on the stream; nothing waits for the device. Each function gives the first error of its
// launches (cudaSuccess where there is none); errors of the kernels themselves show at the next synchronization.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace balora {

enum class Type { float32, float16, bfloat16 };

// A batch of matrices A [batch, m, n]; the entries of a row lie next to each other. Strides in entries.
struct Matrices {
  const void* data;
  Type type;
  int64_t batch, m, n;
  int64_t batch_stride, row_stride;
};

// The columns that a sketch can have. Wider ones, and float64, are the caller's: batched library calls.
constexpr int LARGEST_WIDTH = 64;

// Bytes of device memory that randomized_svd wants for a sketch of `width` columns. With fewer it takes the batch in
// more parts; below least_workspace_bytes, one matrix, it refuses.
int64_t workspace_bytes(const Matrices& a, int width);
int64_t least_workspace_bytes(const Matrices& a, int width);

// The k leading singular triplets, A ~ U diag(S) Vh, from a sketch of `width` columns and n_iter power iterations
// (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1), 1 <= k <= width <= min(m, n, LARGEST_WIDTH):
// u [batch, m, k], s [batch, k], vh [batch, k, n], squares [batch] = ||A||_F^2, NaN where it is not finite. workspace:
// 256-byte aligned.
cudaError_t randomized_svd(const Matrices& a, int k, int width, int n_iter, uint64_t seed, float* u, float* s,
                           float* vh, double* squares, void* workspace, int64_t bytes, cudaStream_t stream);

// All singular triplets of small matrices c [batch, width, width], 1 <= width <= LARGEST_SMALL: s [batch, width], left
// [batch, width, width] = Uᵀ, right [batch, width, width] = Vᵀ. For what comes before it, batched library calls will do;
// their decompositions wait for the device and take one matrix after the other.
constexpr int LARGEST_SMALL = 256;
int64_t small_svd_bytes(int64_t batch, int width);
cudaError_t small_svd(const double* c, int64_t batch, int width, double* s, double* left, double* right,
                      void* workspace, cudaStream_t stream);

// out = multiple * Z + U diag(weights) Vh, in the type of Z, contiguous: u [batch, m, k], weights [batch, k],
// vh [batch, k, n], multiple [batch].
cudaError_t low_rank_update(const Matrices& z, int k, const float* u, const float* weights, const float* vh,
                            const float* multiple, void* out, cudaStream_t stream);

}  // namespace balora
