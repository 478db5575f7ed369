// The order of the steps, and the memory between them.

#include "kernels.cuh"

namespace balora {
namespace {

constexpr int64_t SPREAD = 264;      // blocks for a Gram matrix: two for each multiprocessor
constexpr int64_t MOST_GRAMS = 64;   // partial sums that one block adds up
constexpr int64_t PREFERRED = 512 << 20;

int rows_of(int width) { return int(round_up(width, 16)); }

int64_t gram_blocks(const Panel& shape, int64_t batch) {
  const int64_t wanted = divide_up(SPREAD, batch), most = shape.stride / 64;
  return wanted < most ? (wanted < MOST_GRAMS ? wanted : MOST_GRAMS) : (most < MOST_GRAMS ? most : MOST_GRAMS);
}

// One piece of memory after the other, each on a boundary of 256 bytes; without memory it only counts.
struct Memory {
  char* start;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* at = start == nullptr ? nullptr : reinterpret_cast<T*>(start + used);
    used += round_up(count * int64_t(sizeof(T)), 256);
    return at;
  }
};

// What is held for `batch` matrices at a time.
struct Buffers {
  Cut rows, columns;  // of A X and of Aᵀ X
  Panel of_rows, of_columns;
  int L;
  int64_t row_grams, column_grams, once, used;  // once: the slices of A (Aᵀ Q) in one reading
  float *q, *p, *partial;  // Q [batch, L, m], P [batch, L, n]; the slices of a product
  char* operand;
  double *grams, *sums, *lower, *polish, *inverse, *left, *right;

  Buffers(const Matrices& a, int width, int64_t batch, void* memory)
      : rows(cut(a, false, batch)), columns(cut(a, true, batch)), of_rows(a.m), of_columns(a.n), L(rows_of(width)) {
    row_grams = gram_blocks(of_rows, batch);
    column_grams = gram_blocks(of_columns, batch);
    once = iteration_slices(a, L, batch);
    const int64_t each = batch * L, small = batch * width * width;
    const int64_t a_x = (rows.slices > once ? rows.slices : once) * of_rows.stride;
    const int64_t at_x = columns.slices * of_columns.stride;
    const int64_t longest = of_rows.stride > of_columns.stride ? of_rows.stride : of_columns.stride;
    Memory free{static_cast<char*>(memory)};
    q = free.take<float>(each * of_rows.stride);
    p = free.take<float>(each * of_columns.stride);
    partial = free.take<float>(each * (a_x > at_x ? a_x : at_x));
    operand = a.type == Type::float32 ? nullptr : free.take<char>(4 * each * longest);
    grams = free.take<double>(each * L * (row_grams > column_grams ? row_grams : column_grams));
    sums = free.take<double>(batch * rows.tiles * rows.slices);
    lower = free.take<double>(small);
    polish = free.take<double>(small);
    inverse = free.take<double>(small);
    left = free.take<double>(small);
    right = free.take<double>(small);
    used = free.used;
  }
};

// How many matrices at a time: the batch in as few even parts as fit; 0 where not even one does.
int64_t at_once(const Matrices& a, int width, int64_t bytes) {
  for (int64_t parts = 1; parts <= a.batch; ++parts) {
    const int64_t each = divide_up(a.batch, parts);
    if (Buffers(a, width, each, nullptr).used <= bytes) return each;
  }
  return 0;
}

struct Run {
  const Matrices& a;
  int width, n_iter, k;
  uint64_t seed;
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  bool good(cudaError_t found) {
    if (error == cudaSuccess) error = found;
    return error == cudaSuccess;
  }

  float scale() const { return a.type == Type::float16 ? 1 / part_scale<Float16>() : 1.0f; }

  // The panel, orthonormal: that of a product in so many slices, or with none as it is.
  void orthonormalize(Buffers& b, float* panel, const Panel& shape, int64_t batch, int64_t slices, float scale,
                      double* lower) {
    const int64_t blocks = panel == b.q ? b.row_grams : b.column_grams;
    if (slices > 0) good(gather(b.partial, slices, scale, panel, batch, b.L, shape, stream));
    good(gram(panel, batch, b.L, shape, blocks, b.grams, stream)) &&
        good(factor(b.grams, blocks, batch, b.L, width, lower, b.inverse, stream)) &&
        good(apply(panel, batch, b.L, width, shape, b.inverse, a.type, b.operand, seed, stream));
  }

  // A X or Aᵀ X for the panel X of which the operand is.
  void product(Buffers& b, int64_t first, int64_t batch, bool transposed) {
    const void* operand = b.operand != nullptr ? static_cast<void*>(b.operand) : transposed ? b.q : b.p;
    good(multiply(a, first, batch, transposed, b.L, transposed ? b.columns : b.rows, operand, b.partial, stream));
  }

  void matrices(Buffers& b, int64_t first, int64_t batch, float* u, float* s, float* vh, double* squares) {
    good(sketch(a, first, batch, b.L, b.rows, seed, b.partial, b.sums, squares, stream));
    orthonormalize(b, b.q, b.of_rows, batch, b.rows.slices, 1.0f, b.lower);
    for (int i = 0; i < n_iter; ++i) {
      if (b.once) {
        good(iterate_once(a, first, batch, b.L, b.once, b.operand, squares, b.partial, stream));
        orthonormalize(b, b.q, b.of_rows, batch, b.once, 1.0f, b.lower);
        continue;
      }
      product(b, first, batch, true);
      orthonormalize(b, b.p, b.of_columns, batch, b.columns.slices, scale(), b.lower);
      product(b, first, batch, false);
      orthonormalize(b, b.q, b.of_rows, batch, b.rows.slices, scale(), b.lower);
    }
    orthonormalize(b, b.q, b.of_rows, batch, 0, 1.0f, b.lower);
    // B = Qᵀ A = C Pᵀ with C = lower polish: P is orthonormal after the second pass.
    product(b, first, batch, true);
    orthonormalize(b, b.p, b.of_columns, batch, b.columns.slices, scale(), b.lower);
    orthonormalize(b, b.p, b.of_columns, batch, 0, 1.0f, b.polish);
    good(jacobi(b.lower, b.polish, batch, width, k, s, b.left, b.right, stream)) &&
        good(turn(b.q, batch, b.L, width, k, b.of_rows, b.left, false, u, stream)) &&
        good(turn(b.p, batch, b.L, width, k, b.of_columns, b.right, true, vh, stream));
  }
};

}  // namespace

int64_t least_workspace_bytes(const Matrices& a, int width) { return Buffers(a, width, 1, nullptr).used; }

int64_t workspace_bytes(const Matrices& a, int width) {
  const int64_t batch = at_once(a, width, PREFERRED);
  return batch == 0 ? least_workspace_bytes(a, width) : Buffers(a, width, batch, nullptr).used;
}

cudaError_t randomized_svd(const Matrices& a, int k, int width, int n_iter, uint64_t seed, float* u, float* s,
                           float* vh, double* squares, void* workspace, int64_t bytes, cudaStream_t stream) {
  if (k < 1 || k > width || width > LARGEST_WIDTH || width > a.m || width > a.n || n_iter < 0 || a.batch < 0)
    return cudaErrorInvalidValue;
  if (a.batch == 0) return cudaSuccess;
  const int64_t step = at_once(a, width, bytes);
  if (step == 0) return cudaErrorInvalidValue;
  Buffers buffers(a, width, step, workspace);
  Run run{a, width, n_iter, k, seed, stream};
  for (int64_t first = 0; first < a.batch && run.error == cudaSuccess; first += step) {
    const int64_t batch = first + step < a.batch ? step : a.batch - first;
    run.matrices(buffers, first, batch, u + first * a.m * k, s + first * k, vh + first * k * a.n,
                 squares + first);
  }
  return run.error;
}

}  // namespace balora
