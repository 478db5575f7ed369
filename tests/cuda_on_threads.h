// Runs the kernels of csrc/ on a CPU: csrc/device.cuh includes this header in place of CUDA's when BALORA_ON_THREADS is
// defined. The threads of a block are fibers of one thread, or, with BALORA_REAL_THREADS, threads of the system, which
// the thread sanitizer watches. Blocks run one after the other. What a GPU may do in any order the fibers do in changing
// orders: forward, then backward.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#ifdef BALORA_REAL_THREADS
#include <pthread.h>
#include <thread>
#endif

#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __restrict__

inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace balora {
namespace cpu {

struct Index {
  unsigned x;
};

constexpr int WARP = 32;
struct Warp {  // what lanes show each other
  double shown[WARP];
  const void* rows[WARP];
  uint32_t a[WARP][4], b[WARP][2];
};

#ifdef BALORA_REAL_THREADS
inline thread_local Index thread, block, blocks;
// std::barrier spins first, which hundreds of threads on few cores pay for with minutes. Two barriers in turns: the
// sanitizer orders a thread that wakes from one behind all that have reached it, also those that reach it the next time.
struct Barrier {
  explicit Barrier(unsigned size) {
    for (auto& each : at) pthread_barrier_init(&each, nullptr, size);
  }
  ~Barrier() {
    for (auto& each : at) pthread_barrier_destroy(&each);
  }
  Barrier(const Barrier&) = delete;
  pthread_barrier_t at[2];
  unsigned char passed[1024] = {};  // by each thread
};
inline void wait(Barrier& barrier) { pthread_barrier_wait(&barrier.at[barrier.passed[thread.x]++ % 2]); }
#else
inline Index thread, block, blocks;

struct Fiber {
  std::jmp_buf at;
  ucontext_t start;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool begun = false, done = false;
};
struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::jmp_buf home;
  ucontext_t origin;
  std::function<void()> body;
  long progress = 0;
};
inline Scheduler scheduler;

inline void run_fiber() {
  scheduler.body();
  scheduler.fibers[thread.x]->done = true;
  ++scheduler.progress;
  _longjmp(scheduler.home, 1);
}

inline void yield() {
  const unsigned mine = thread.x;
  if (_setjmp(scheduler.fibers[mine]->at) == 0) _longjmp(scheduler.home, 1);
  thread.x = mine;
}

inline void resume(unsigned i) {
  thread.x = i;
  Fiber& fiber = *scheduler.fibers[i];
  if (_setjmp(scheduler.home) != 0) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

// Fibers run until all are done, in changing orders.
inline void run_fibers(int threads) {
  while (int(scheduler.fibers.size()) < threads) scheduler.fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < threads; ++i) scheduler.fibers[i]->begun = scheduler.fibers[i]->done = false;
  for (bool forward = true;; forward = !forward) {
    const long before = scheduler.progress;
    bool left = false;
    for (int i = 0; i < threads; ++i) {
      const int next = forward ? i : threads - 1 - i;
      if (scheduler.fibers[next]->done) continue;
      left = true;
      resume(next);
    }
    if (!left) return;
    if (scheduler.progress == before) {
      std::fprintf(stderr, "threads of a block wait at different barriers, or for one that has ended\n");
      std::abort();
    }
  }
}

struct Barrier {
  explicit Barrier(int size) : size(size) {}
  int size, arrived = 0;
  long passed = 0;
};
inline void wait(Barrier& barrier) {
  const long mine = barrier.passed;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.passed;
    ++scheduler.progress;
    return;
  }
  while (barrier.passed == mine) yield();
}
#endif

struct Block {
  explicit Block(int threads, size_t shared) : all(threads), end(threads), memory(new char[shared + 1]), warps(threads / WARP) {
    for (int i = 0; i < threads / WARP; ++i) of_warp.push_back(std::make_unique<Barrier>(WARP));
  }
  Barrier all, end;  // end: of those that have left the kernel; no other barrier may count them
  std::vector<std::unique_ptr<Barrier>> of_warp;
  std::unique_ptr<char[]> memory;
  std::vector<Warp> warps;
  std::vector<char> votes;
};
inline Block* current = nullptr;

inline unsigned lane() { return thread.x % WARP; }
inline Warp& warp() { return current->warps[thread.x / WARP]; }
inline void warp_barrier() { wait(*current->of_warp[thread.x / WARP]); }

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float out;
  if (exponent == 0) {
    out = float(fraction) * 0x1p-24f;
    return sign ? -out : out;
  }
  const uint32_t word = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  std::memcpy(&out, &word, 4);
  return out;
}

}  // namespace cpu

#define threadIdx ::balora::cpu::thread
#define blockIdx ::balora::cpu::block
#define gridDim ::balora::cpu::blocks

inline char* shared_memory() { return cpu::current->memory.get(); }
inline void barrier() { cpu::wait(cpu::current->all); }
inline bool barrier_or(bool any) {
  auto& votes = cpu::current->votes;
  votes[cpu::thread.x] = any;
  barrier();
  bool found = false;
  for (char vote : votes) found |= vote;
  barrier();
  return found;
}
inline double shuffle_xor(double x, int lanes) {
  cpu::warp().shown[cpu::lane()] = x;
  cpu::warp_barrier();
  const double found = cpu::warp().shown[cpu::lane() ^ lanes];
  cpu::warp_barrier();
  return found;
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Float16 x) { return cpu::half_to_float(x.bits); }
inline float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

template <class T>
T rounded(float x);
template <>
inline float rounded<float>(float x) {
  return x;
}
template <>
inline BFloat16 rounded<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Float16 rounded<Float16>(float x) {
  if (x != x) return {0x7fff};
  const uint16_t sign = float_to_bits(x) >> 16 & 0x8000;
  const float size = x < 0 ? -x : x;
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  uint16_t low = 0, high = 0x7c00;  // the largest number that is not above it
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (cpu::half_to_float(middle) <= size ? low : high) = middle;
  }
  const float below = size - cpu::half_to_float(low);
  const float above = (low + 1 == 0x7c00 ? 65536.0f : cpu::half_to_float(low + 1)) - size;
  return {uint16_t(sign | (below < above || (below == above && low % 2 == 0) ? low : low + 1))};
}

inline uint32_t to_tf32(float x) {  // to nearest, ties away from zero
  const uint32_t bits = float_to_bits(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

namespace cpu {

inline float entry(BFloat16, uint32_t word, int i) { return bits_to_float(i ? word & 0xffff0000 : word << 16); }
inline float entry(Float16, uint32_t word, int i) { return half_to_float(uint16_t(i ? word >> 16 : word)); }
inline float entry(float, uint32_t word, int) {
  if (word & 0x1fff && (word & 0x7f800000) != 0x7f800000) {
    std::fprintf(stderr, "a tensor core was given a float that is not tf32\n");
    std::abort();
  }
  return bits_to_float(word);
}

}  // namespace cpu

// Fragments as in the PTX manual, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8": with g = lane / 4 and
// t = lane % 4, and E entries a word: a[0] (g, Et..), a[1] (g + 8, Et..), a[2] (g, Et + 4E..), a[3] (g + 8, Et + 4E..);
// b[0] (Et.., g), b[1] (Et + 4E.., g); d[0, 1] (g, 2t, 2t + 1), d[2, 3] (g + 8, ..).
template <class T>
inline void mma(T kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int E = 4 / sizeof(T);
  auto& warp = cpu::warp();
  const unsigned lane = cpu::lane(), g = lane / 4, t = lane % 4;
  std::memcpy(warp.a[lane], a, sizeof a);
  std::memcpy(warp.b[lane], b, sizeof b);
  cpu::warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const unsigned column = 2 * t + i % 2;
    double terms[17] = {d[i]}, most = d[i] < 0 ? -d[i] : d[i], sum = 0;
    for (unsigned k = 0; k < 8 * E; ++k) {
      const unsigned half = k / (4 * E), owner = k % (4 * E) / E, place = k % E;
      const double left = cpu::entry(kind, warp.a[4 * g + owner][2 * half + i / 2], place);
      terms[k + 1] = left * cpu::entry(kind, warp.b[4 * column + owner][half], place);
      most = std::fmax(most, std::fabs(terms[k + 1]));
    }
    // As measured of the devices (Fasi, Higham, Mikaitis and Pranesh, 2021): the terms are aligned to the largest, cut off
    // at 24 bits and one more, and so is their sum.
    const double bit = most > 0 && most < INFINITY ? std::exp2(std::floor(std::log2(most)) - 24) : 0;
    for (double term : terms) sum += bit > 0 ? std::trunc(term / bit) * bit : term;
    if (bit > 0 && sum != 0) {
      const double last = std::exp2(std::floor(std::log2(std::fabs(sum))) - 23);
      sum = std::trunc(sum / last) * last;
    }
    d[i] = float(sum);
  }
  cpu::warp_barrier();
}

// ldmatrix.x4.trans: word i of a lane is entries (2 t, g) and (2 t + 1, g) of matrix i.
inline void load_transposed(uint32_t (&words)[4], const void* row) {
  auto& warp = cpu::warp();
  const unsigned lane = cpu::lane(), g = lane / 4, t = lane % 4;
  warp.rows[lane] = row;
  cpu::warp_barrier();
  for (unsigned i = 0; i < 4; ++i) {
    const auto entry = [&](unsigned r) { return uint32_t(static_cast<const uint16_t*>(warp.rows[8 * i + r])[g]); };
    words[i] = entry(2 * t) | entry(2 * t + 1) << 16;
  }
  cpu::warp_barrier();
}

// Copies wait until they are asked for: nobody may count on them earlier.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
#ifdef BALORA_REAL_THREADS
inline thread_local std::vector<Copy> copies[1];
inline std::vector<Copy>& my_copies() { return copies[0]; }
#else
inline std::vector<Copy> copies[1024];
inline std::vector<Copy>& my_copies() { return copies[cpu::thread.x]; }
#endif
inline void copy_async(void* to, const void* from, int bytes) { my_copies().push_back({to, from, bytes}); }
inline void copies_issued() {}
inline void copies_done() {
  for (const Copy& copy : my_copies()) {
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  my_copies().clear();
}
inline size_t most_shared_memory() { return 227 * 1024; }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t,
                   Arguments... arguments) {
  if (blocks < 0 || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 227 * 1024) return cudaErrorInvalidValue;
  cpu::Block block(threads, shared);
  block.votes.assign(threads, 0);
  std::memset(block.memory.get(), 0xff, shared);
  cpu::current = &block;
  auto thread = [&] {
    cpu::blocks.x = unsigned(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      cpu::block.x = unsigned(b);
      kernel(Parameters(arguments)...);
      cpu::wait(block.end);
      // Each block finds NaN in its memory: nothing may be read before it is written.
      if (cpu::thread.x == 0) std::memset(block.memory.get(), 0xff, shared);
      cpu::wait(block.end);
    }
  };
#ifdef BALORA_REAL_THREADS
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i)
    pool.emplace_back([&, i] {
      cpu::thread.x = i;
      thread();
    });
  for (auto& each : pool) each.join();
#else
  cpu::scheduler.body = thread;
  cpu::run_fibers(threads);
#endif
  cpu::current = nullptr;
  return cudaSuccess;
}

}  // namespace balora
