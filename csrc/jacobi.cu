// The singular value decomposition of small matrices, one block a matrix: Hestenes' one-sided Jacobi method. Pairs of
// columns are rotated until all are orthogonal: C V = U diag(S). In a round of a round robin every column has one
// partner, so all pairs of a round are rotated at once. In double: what came before is float, and this is small. Up to
// 64 columns stand in shared memory, more of them in global memory, which for so few is the cache.
#include "kernels.cuh"

namespace balora {
namespace {

constexpr int SWEEPS = 20;             // it converges quadratically: 6 to 9 are usual
constexpr double ORTHOGONAL = 1e-13;   // the cosine of two columns that are not rotated
constexpr double NUDGE = 1e-18;        // of the largest entry, onto the diagonal
constexpr int LANES = 4;               // of a pair of columns
constexpr int MOST = 512;              // threads for more than 64 columns

__device__ inline double sum_of_lanes(double x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// C is first second, both lower triangular, or first alone where second is null.
template <int BLOCK, class S>
__global__ void __launch_bounds__(BLOCK) jacobi_kernel(const double* first, const double* second, int width, int k,
                                                       S* s, double* left, double* right, double* memory,
                                                       const double* partial_squares, int64_t parts,
                                                       double* squares) {
  const int64_t matrix = blockIdx.x;
  double* size = reinterpret_cast<double*>(shared_memory());  // [width]
  const int pitch = width | 1;  // an odd one keeps the banks of neighbouring columns apart
  // [width, pitch], columns one after the other: C, then U diag(S); and V
  double* c = memory == nullptr ? size + width : memory + matrix * 2 * width * pitch;
  double* v = c + width * pitch;
  first += matrix * width * width;
  if (second != nullptr) second += matrix * width * width;

  for (int i = threadIdx.x; i < width * width; i += BLOCK) {
    const int row = i % width, column = i / width;
    double sum = second == nullptr ? first[row * width + column] : 0;
    for (int j = column; j <= row && second != nullptr; ++j) sum += first[row * width + j] * second[j * width + column];
    c[column * pitch + row] = sum;
    v[column * pitch + row] = row == column;
  }
  barrier();
  double largest = 0;
  for (int i = threadIdx.x; i < width; i += BLOCK) {
    double of_column = 0;
    for (int row = 0; row < width; ++row) {
      const double x = fabs(c[i * pitch + row]);
      of_column = x > of_column || x != x ? x : of_column;
    }
    size[i] = of_column;
  }
  barrier();
  for (int i = 0; i < width; ++i) largest = size[i] > largest || size[i] != size[i] ? size[i] : largest;
  // A column of zeros has no direction; with this it has one, and U is orthonormal for every C.
  for (int i = threadIdx.x; i < width; i += BLOCK) c[i * pitch + i] += largest == 0 ? 1.0 : NUDGE * largest;
  barrier();

  const int players = width + width % 2, pair = threadIdx.x / LANES, lane = threadIdx.x % LANES;  // enough for all pairs
  for (int sweep = 0; sweep < SWEEPS; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < players - 1; ++round) {
      // The last player stays; the others meet across a circle.
      int p = pair == 0 ? players - 1 : (round + pair) % (players - 1);
      int q = (round + players - 1 - pair) % (players - 1);
      if (p > q) {
        const int other = p;
        p = q, q = other;
      }
      const bool plays = pair < players / 2 && q < width;
      double *cp = c + p * pitch, *cq = c + q * pitch, *vp = v + p * pitch, *vq = v + q * pitch;
      double pp = 0, qq = 0, pq = 0;
      for (int i = lane; i < width && plays; i += LANES) {
        pp += cp[i] * cp[i];
        qq += cq[i] * cq[i];
        pq += cp[i] * cq[i];
      }
      pp = sum_of_lanes(pp);
      qq = sum_of_lanes(qq);
      pq = sum_of_lanes(pq);
      if (plays && fabs(pq) > ORTHOGONAL * sqrt(pp * qq)) {
        rotated = true;
        const double zeta = (qq - pp) / (2 * pq);
        const double t = (zeta < 0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1 + zeta * zeta));
        const double cosine = 1 / sqrt(1 + t * t), sine = cosine * t;
        for (int i = lane; i < width; i += LANES) {
          const double a = cp[i], b = cq[i], x = vp[i], y = vq[i];
          cp[i] = cosine * a - sine * b;
          cq[i] = sine * a + cosine * b;
          vp[i] = cosine * x - sine * y;
          vq[i] = sine * x + cosine * y;
        }
      }
      barrier();
    }
    if (!barrier_or(rotated)) break;
  }

  for (int i = threadIdx.x; i < width; i += BLOCK) {
    double sum = 0;
    for (int row = 0; row < width; ++row) sum += c[i * pitch + row] * c[i * pitch + row];
    size[i] = sqrt(sum);
  }
  barrier();
  for (int i = threadIdx.x; i < width * width; i += BLOCK) {
    const int column = i / width, row = i % width;
    int place = 0;  // in descending order; of equal ones the first first
    for (int j = 0; j < width; ++j) place += size[j] > size[column] || (size[j] == size[column] && j < column);
    if (size[column] != size[column]) place = column;
    if (place >= k) continue;
    if (row == 0) s[matrix * k + place] = S(largest == 0 ? 0.0 : size[column]);
    left[(matrix * k + place) * width + row] = c[column * pitch + row] / size[column];
    right[(matrix * k + place) * width + row] = v[column * pitch + row];
  }

  if (squares != nullptr && threadIdx.x == 0) {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += partial_squares[matrix * parts + i];
    squares[matrix] = sum;
  }
}

}  // namespace

cudaError_t jacobi(const double* first, const double* second, int64_t batch, int width, int k, float* s, double* left,
                   double* right, const double* partial_squares, int64_t parts, double* squares, cudaStream_t stream) {
  const size_t shared = (2 * width * (width | 1) + width) * sizeof(double);
  return launch(jacobi_kernel<THREADS, float>, batch, THREADS, shared, stream, first, second, width, k, s, left, right,
                nullptr, partial_squares, parts, squares);
}

int64_t small_svd_bytes(int64_t batch, int width) { return batch * 2 * width * (width | 1) * int64_t(sizeof(double)); }

cudaError_t small_svd(const double* c, int64_t batch, int width, double* s, double* left, double* right,
                      void* workspace, cudaStream_t stream) {
  if (width < 1 || width > LARGEST_SMALL || batch < 0) return cudaErrorInvalidValue;
  return launch(jacobi_kernel<MOST, double>, batch, MOST, width * sizeof(double), stream, c, nullptr, width, width, s,
                left, right, static_cast<double*>(workspace), nullptr, 0, nullptr);
}

}  // namespace balora
