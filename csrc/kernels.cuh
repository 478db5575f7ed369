// The steps of the randomized SVD, each a launch or two. A panel is a tall matrix of `width` columns stored as rows:
// [L, stride] with L = 16, 32, 48 or 64 rows, of which those from width on are zero, and stride its length rounded up
// to 64, zero from its length on. So both products read it along the index that they sum over.
#pragma once

#include <type_traits>

#include "randomized_svd.h"

namespace balora {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct Panel {
  int64_t length, stride;
  explicit Panel(int64_t length) : length(length), stride(round_up(length, 64)) {}
};

// How a product is cut: `tiles` of its result for each matrix, each from `slices` partial sums over `step` entries.
struct Cut {
  int64_t tiles, slices, step;
};
Cut cut(const Matrices& a, bool transposed, int64_t at_once);

// Calls f with L as a constant.
template <class F>
cudaError_t with_rows(int L, F f) {
  switch (L) {
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 48: return f(std::integral_constant<int, 48>());
    case 64: return f(std::integral_constant<int, 64>());
  }
  return cudaErrorInvalidValue;
}
template <class F>
cudaError_t with_type(Type type, F f) {
  switch (type) {
    case Type::float32: return f(float());
    case Type::float16: return f(Float16());
    case Type::bfloat16: return f(BFloat16());
  }
  return cudaErrorInvalidValue;
}

inline int item_size(Type type) { return type == Type::float32 ? 4 : 2; }
// Tensor cores take a panel of half precision in two parts, high and low. fp16 has few exponents: its parts are of the
// panel times 4096.
template <class T>
__device__ __host__ constexpr float part_scale() {
  return 1.0f;
}
template <>
__device__ __host__ constexpr float part_scale<Float16>() {
  return 4096.0f;
}

// partial [batch, slices, L, stride of m]: A Omega; squares [batch] = ||A||_F^2 from sums [batch, tiles * slices], NaN
// where it is not finite.
cudaError_t sketch(const Matrices& a, int64_t first, int64_t batch, int L, const Cut& cut, uint64_t seed,
                   float* partial, double* sums, double* squares, cudaStream_t stream);
// partial [batch, slices, L, ...]: A X, or Aᵀ X; operand [batch, parts, L, stride] are the parts of X.
cudaError_t multiply(const Matrices& a, int64_t first, int64_t batch, bool transposed, int L, const Cut& cut,
                     const void* operand, float* partial, cudaStream_t stream);
// A (Aᵀ X) with one reading of A, times a power of two near 1/||A||: in how many slices, 0 where it cannot be done; and
// partial as of `multiply`.
int64_t iteration_slices(const Matrices& a, int L, int64_t batch);
cudaError_t iterate_once(const Matrices& a, int64_t first, int64_t batch, int L, int64_t slices, const void* operand,
                         const double* squares, float* partial, cudaStream_t stream);
// panel [batch, L, stride] = scale * the sum of its slices.
cudaError_t gather(const float* partial, int64_t slices, float scale, float* panel, int64_t batch, int L,
                   const Panel& shape, cudaStream_t stream);
// grams [batch, blocks, L, L]: partial sums of the panel's Gram matrix.
cudaError_t gram(const float* panel, int64_t batch, int L, const Panel& shape, int64_t blocks, double* grams,
                 cudaStream_t stream);
// lower [batch, width, width] with lower lowerᵀ = the sum of the Gram matrices, and its inverse.
cudaError_t factor(const double* grams, int64_t blocks, int64_t batch, int L, int width, double* lower,
                   double* inverse, cudaStream_t stream);
// The panel with orthonormal columns, in place, and its parts (unless null).
cudaError_t apply(float* panel, int64_t batch, int L, int width, const Panel& shape, const double* inverse, Type type,
                  void* operand, uint64_t seed, cudaStream_t stream);
// The SVD of C = first second [width, width], both lower triangular: s [batch, k], left and right [batch, k, width] in
// double, rows.
cudaError_t jacobi(const double* first, const double* second, int64_t batch, int width, int k, float* s, double* left,
                   double* right, cudaStream_t stream);
// out = the panel times turn [batch, k, width]: as columns, [batch, length, k], or as rows, [batch, k, length].
cudaError_t turn(const float* panel, int64_t batch, int L, int width, int k, const Panel& shape, const double* turn,
                 bool as_rows, float* out, cudaStream_t stream);

}  // namespace balora
