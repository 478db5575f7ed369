// What the kernels ask of the device: launches, barriers, shuffles, tensor cores, narrow types. All of it stands here,
// so that a header of the tests can stand in for it and run the same kernels on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace balora {

// Bits of half-precision numbers; kernels compute in float and double.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace balora

#ifdef BALORA_ON_THREADS
#include "cuda_on_threads.h"
#else
#include <cuda_runtime.h>
#endif

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace balora {

// Shared memory of the block, as much as its launch asked for.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ inline void barrier() { __syncthreads(); }
__device__ inline bool barrier_or(bool any) { return __syncthreads_or(any); }
__device__ inline double shuffle_xor(double x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <class T>
__device__ T rounded(float x);
template <>
__device__ inline float rounded<float>(float x) {
  return x;
}
template <>
__device__ inline Float16 rounded<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ inline BFloat16 rounded<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

__device__ inline float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// x in the 19 bits that a tensor core takes of a float.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d += a b on the tensor cores: a [16, K], b [K, 8], d [16, 8] in the fragments of mma.m16n8k16 (K = 16, two entries a
// word) and of mma.m16n8k8 (float: K = 8, one entry a word, in tf32).
__device__ inline void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma(Float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 x 8 halves, as fragments of their transposes: lane i has the address of row i % 8 of matrix i / 8.
__device__ inline void load_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// 16 bytes to shared memory, in the background: the first `bytes` from `from`, then zeros.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ inline void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void copies_done() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }  // of this thread

// Bytes that a block can have on the current device.
inline size_t most_shared_memory() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return size_t(bytes);
}

// One block for each of `blocks`, in one dimension: its limit is 2^31 - 1, that of the others 65,535.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks < 0 || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {  // more than a kernel has without asking
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(blocks), threads, shared, stream>>>(Parameters(arguments)...);
  return cudaGetLastError();
}

}  // namespace balora
#endif
