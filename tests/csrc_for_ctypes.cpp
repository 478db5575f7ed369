// The interface of csrc/ and its steps, with C names for ctypes.
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

// slices [batch, slices of the cut, L, stride]; how many slices there are is the result, or minus the error.
int64_t balora_sketch(const void* data, int type, int64_t batch, int64_t m, int64_t n, int64_t batch_stride,
                      int64_t row_stride, int rows, uint64_t seed, float* slices, double* sums,
                      double* squares) {
  const Matrices a = matrices(data, type, batch, m, n, batch_stride, row_stride);
  const Cut cut = balora::cut(a, false, batch);
  if (slices == nullptr) return cut.tiles << 32 | cut.slices;
  return sketch(a, 0, batch, rows, cut, seed, slices, sums, squares, nullptr);
}

int64_t balora_multiply(const void* data, int type, int64_t batch, int64_t m, int64_t n, int64_t batch_stride,
                        int64_t row_stride, int transposed, int rows, const void* operand, float* slices) {
  const Matrices a = matrices(data, type, batch, m, n, batch_stride, row_stride);
  const Cut cut = balora::cut(a, transposed, batch);
  if (slices == nullptr) return cut.slices;
  return multiply(a, 0, batch, transposed, rows, cut, operand, slices, nullptr);
}

int64_t balora_iterate(const void* data, int type, int64_t batch, int64_t m, int64_t n, int64_t batch_stride,
                       int64_t row_stride, int rows, const void* operand, const double* squares, float* slices) {
  const Matrices a = matrices(data, type, batch, m, n, batch_stride, row_stride);
  const int64_t count = iteration_slices(a, rows, batch);
  if (slices == nullptr) return count;
  return iterate_once(a, 0, batch, rows, count, operand, squares, slices, nullptr);
}

// The panel [batch, L, stride] made orthonormal, in place; lower [batch, width, width].
int balora_orthonormalize(float* panel, int64_t batch, int rows, int width, int64_t length, int64_t blocks,
                          double* grams, double* lower, double* inverse, int type, void* operand) {
  const Panel shape(length);
  int error = gram(panel, batch, rows, shape, blocks, grams, nullptr);
  error |= factor(grams, blocks, batch, rows, width, lower, inverse, nullptr);
  return error | apply(panel, batch, rows, width, shape, inverse, Type(type), operand, 0, nullptr);
}

int balora_jacobi(const double* first, const double* second, int64_t batch, int width, int k, float* s, double* left,
                  double* right) {
  return jacobi(first, second, batch, width, k, s, left, right, nullptr);
}

int balora_small_svd(const double* c, int64_t batch, int width, double* s, double* left, double* right, void* memory) {
  return small_svd(c, batch, width, s, left, right, memory, nullptr);
}

void balora_philox(uint64_t place, uint32_t row, uint32_t stream, uint64_t seed, uint32_t* out) {
  const Words words = philox(place, row, stream, seed);
  for (int i = 0; i < 4; ++i) out[i] = words.word[i];
}
}
