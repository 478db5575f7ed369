// The singular value decomposition of small matrices, one block a matrix: Hestenes' one-sided Jacobi method. Pairs of
// columns are rotated until all are orthogonal: C V = U diag(S). In a round of a round robin every column has one
// partner, so all pairs of a round are rotated at once. In double: what came before is float, and this is small. Up to
// 64 columns stand in shared memory, more of them in global memory, which for so few is the cache.
#include "kernels.cuh"

namespace balora {
namespace {

constexpr int SWEEPS = 20;           // it converges quadratically: 6 to 10 are usual
constexpr double EPS = 0x1p-52;
constexpr double NUDGE = 1e-18;      // of the largest entry, onto the diagonal
constexpr double NOTHING = 1e-100;   // of the largest entry: a column that rotations have cancelled
constexpr int LANES = 4;             // of a pair of columns
constexpr int MOST = 512;            // threads for more than 64 columns

__device__ inline double sum_of_lanes(double x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// A column that rotations have cancelled becomes orthogonal to all others: of the unit vector that they hold the
// least of, what they do not hold. By one thread, for it hardly ever happens.
__device__ inline void complete(double* c, double* size, int width, int pitch, int column) {
  double most = 0;
  int unit = 0;
  for (int i = 0; i < width; ++i) {
    double left = 1;
    for (int j = 0; j < width; ++j)
      if (size[j] != 0 || j < column) left -= c[j * pitch + i] * c[j * pitch + i];
    if (left > most) most = left, unit = i;
  }
  double* u = c + column * pitch;
  for (int i = 0; i < width; ++i) u[i] = i == unit;
  for (int pass = 0; pass < 2; ++pass) {
    for (int j = 0; j < width; ++j) {
      if (size[j] == 0 && j >= column) continue;
      double product = 0;
      for (int i = 0; i < width; ++i) product += c[j * pitch + i] * u[i];
      for (int i = 0; i < width; ++i) u[i] -= product * c[j * pitch + i];
    }
    double square = 0;
    for (int i = 0; i < width; ++i) square += u[i] * u[i];
    for (int i = 0; i < width; ++i) u[i] *= rsqrt(square);
  }
}

// C is first second, both lower triangular, or first alone where second is null.
template <int BLOCK, class S>
__global__ void __launch_bounds__(BLOCK) jacobi_kernel(const double* first, const double* second, int width, int k,
                                                       S* s, double* left, double* right, double* memory) {
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
  // Sums of squares must not leave the range of double. And a column of zeros has no direction; with a nudge it has one.
  const double exponent = largest > 0 && largest - largest == 0 ? floor(log2(largest)) : 0;
  const double scale = exp2(exponent < -1000 ? 1000 : -exponent);
  for (int i = threadIdx.x; i < width * width; i += BLOCK) c[i / width * pitch + i % width] *= scale;
  barrier();
  for (int i = threadIdx.x; i < width; i += BLOCK) c[i * pitch + i] += largest == 0 ? 1.0 : NUDGE;
  barrier();

  const int players = width + width % 2, pair = threadIdx.x / LANES, lane = threadIdx.x % LANES;  // enough for all pairs
  const double orthogonal = 2 * EPS * sqrt(double(width));  // the cosine of two columns that are not rotated
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
      if (plays && fabs(pq) > orthogonal * sqrt(pp) * sqrt(qq)) {
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
    double of_c = 0, of_v = 0;
    for (int row = 0; row < width; ++row) {
      of_c += c[i * pitch + row] * c[i * pitch + row];
      of_v += v[i * pitch + row] * v[i * pitch + row];
    }
    size[i] = of_c < NOTHING * NOTHING ? 0 : sqrt(of_c);
    for (int row = 0; row < width; ++row) v[i * pitch + row] *= rsqrt(of_v);  // thousands of rotations leave a trace
  }
  barrier();
  for (int i = threadIdx.x; i < width * width; i += BLOCK)
    if (size[i / width] != 0) c[i / width * pitch + i % width] /= size[i / width];
  barrier();
  for (int i = 0; i < width && threadIdx.x == 0; ++i)
    if (size[i] == 0) complete(c, size, width, pitch, i);
  barrier();
  for (int i = threadIdx.x; i < width * width; i += BLOCK) {
    const int column = i / width, row = i % width;
    int place = 0;  // in descending order; of equal ones the first first
    for (int j = 0; j < width; ++j) place += size[j] > size[column] || (size[j] == size[column] && j < column);
    if (size[column] != size[column]) place = column;
    if (place >= k) continue;
    if (row == 0) s[matrix * k + place] = S(largest == 0 ? 0.0 : size[column] / scale);
    left[(matrix * k + place) * width + row] = c[column * pitch + row];
    right[(matrix * k + place) * width + row] = v[column * pitch + row];
  }
}

}  // namespace

cudaError_t jacobi(const double* first, const double* second, int64_t batch, int width, int k, float* s, double* left,
                   double* right, cudaStream_t stream) {
  const size_t shared = (2 * width * (width | 1) + width) * sizeof(double);
  return launch(jacobi_kernel<THREADS, float>, batch, THREADS, shared, stream, first, second, width, k, s, left, right,
                nullptr);
}

int64_t small_svd_bytes(int64_t batch, int width) { return batch * 2 * width * (width | 1) * int64_t(sizeof(double)); }

cudaError_t small_svd(const double* c, int64_t batch, int width, double* s, double* left, double* right,
                      void* workspace, cudaStream_t stream) {
  if (width < 1 || width > LARGEST_SMALL || batch < 0) return cudaErrorInvalidValue;
  return launch(jacobi_kernel<MOST, double>, batch, MOST, width * sizeof(double), stream, c, nullptr, width, width, s,
                left, right, static_cast<double*>(workspace));
}

}  // namespace balora
