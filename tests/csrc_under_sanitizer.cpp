// Every kernel of csrc/ on real threads, for the thread sanitizer: compiled with -fsanitize=thread.
#include <cstdio>
#include <vector>

#include "kernels.cuh"

using namespace balora;

template <class T>
static void run(Type type, int64_t batch, int64_t m, int64_t n, int k, int width) {
  std::vector<T> a(batch * m * n);
  for (size_t i = 0; i < a.size(); ++i) a[i] = rounded<T>(float(i * 7919 % 101) / 101 - 0.5f);
  const Matrices matrices{a.data(), type, batch, m, n, m * n, n};
  std::vector<float> u(batch * m * k), s(batch * k), vh(batch * k * n), multiple(batch, 0.5f);
  std::vector<double> squares(batch);
  const int64_t bytes = workspace_bytes(matrices, width);
  std::vector<char> memory(bytes + 256);
  char* aligned = memory.data() + 256 - reinterpret_cast<uintptr_t>(memory.data()) % 256;
  int error = randomized_svd(matrices, k, width, 1, 0, u.data(), s.data(), vh.data(), squares.data(), aligned, bytes, {});
  std::vector<T> out(a.size());
  error |= low_rank_update(matrices, k, u.data(), s.data(), vh.data(), multiple.data(), out.data(), {});
  std::printf("%d %g %g\n", error, s[0], to_float(out[0]));
}

// A block that takes three tiles, one after the other.
static void iterate() {
  const int64_t m = 70, n = 136, stride = 128;
  std::vector<uint16_t> a(m * n + 8, 0x3f80), operand(2 * 16 * stride, 0x3f80);
  const uint16_t* start = a.data() + (16 - reinterpret_cast<uintptr_t>(a.data()) % 16) % 16 / 2;
  std::vector<float> out(16 * stride);
  const double squares = double(m * n);
  const Matrices matrices{start, Type::bfloat16, 1, m, n, m * n, n};
  const int error = iterate_once(matrices, 0, 1, 16, 1, operand.data(), &squares, out.data(), {});
  std::printf("%d %g\n", error, out[0]);
}

// A column that rotations cancel, and is completed.
static void small() {
  const std::vector<double> c = {4, 2, 4, 4, 2, 4, 2, 4, 6};
  std::vector<double> s(3), left(9), right(9), memory(small_svd_bytes(1, 3) / sizeof(double));
  const int error = small_svd(c.data(), 1, 3, s.data(), left.data(), right.data(), memory.data(), {});
  std::printf("%d %g\n", error, s[0]);
}

int main() {
  iterate();
  small();
  run<float>(Type::float32, 2, 9, 70, 2, 5);
  run<BFloat16>(Type::bfloat16, 1, 40, 9, 1, 3);
  run<float>(Type::float32, 1, 2, 4200, 1, 1);  // long enough for a block that takes several tiles of a panel
}
