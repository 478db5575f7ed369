// The interface of csrc/ with C names, for ctypes.
#include "../csrc/kernels.cuh"
#include "../csrc/random.cuh"

using namespace balora;

static Matrices matrices(const void* data, int type, int64_t batch, int64_t m, int64_t n, int64_t batch_stride,
                         int64_t row_stride) {
  return {data, Type(type), batch, m, n, batch_stride, row_stride};
}

extern "C" {

int64_t balora_workspace_bytes(int type, int64_t batch, int64_t m, int64_t n, int width, int least) {
  const Matrices a = matrices(nullptr, type, batch, m, n, m * n, n);
  return least ? least_workspace_bytes(a, width) : workspace_bytes(a, width);
}

int balora_randomized_svd(const void* data, int type, int64_t batch, int64_t m, int64_t n, int64_t batch_stride,
                          int64_t row_stride, int k, int width, int n_iter, uint64_t seed, float* u, float* s,
                          float* vh, double* squares, void* workspace, int64_t bytes) {
  const Matrices a = matrices(data, type, batch, m, n, batch_stride, row_stride);
  return randomized_svd(a, k, width, n_iter, seed, u, s, vh, squares, workspace, bytes, nullptr);
}

int balora_low_rank_update(const void* data, int type, int64_t batch, int64_t m, int64_t n, int64_t batch_stride,
                           int64_t row_stride, int k, const float* u, const float* weights, const float* vh,
                           const float* multiple, void* out) {
  const Matrices z = matrices(data, type, batch, m, n, batch_stride, row_stride);
  return low_rank_update(z, k, u, weights, vh, multiple, out, nullptr);
}

void balora_philox(uint64_t place, uint32_t row, uint32_t stream, uint64_t seed, uint32_t* out) {
  const Words words = philox(place, row, stream, seed);
  for (int i = 0; i < 4; ++i) out[i] = words.word[i];
}
}
