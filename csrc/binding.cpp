// balora._C: the operators torch.ops.balora.randomized_svd and low_rank_update, and what this build is.
//
// On a CUDA device the kernels of randomized_svd.h do the work; wider sketches, float64 and the CPU take the same
// algorithm in ATen, that of balora/spectral.py, on a CUDA device with the kernel for the small matrix. Compiled without BALORA_WITH_CUDA, nothing of CUDA is needed.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <tuple>

#ifdef BALORA_WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "randomized_svd.h"
#endif

namespace {

using at::Tensor;
using Factors = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // U, S, Vh, squares

// Inside an operator neither autograd nor autocast has a say.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

at::ScalarType arithmetic(const Tensor& a) { return at::promote_types(a.scalar_type(), at::kFloat); }

void check_type(const char* name, const Tensor& t) {  // others, as float8, the kernels would read as bfloat16
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, name,
                   ": expected float32, float64, float16 or bfloat16, found ", type);
}

void check_svd(const Tensor& a, int64_t rank, int64_t oversample, int64_t n_iter) {
  check_type("a", a);
  TORCH_CHECK_VALUE(a.dim() >= 2, "a: expected the shape [..., m, n], found ", a.dim(), " dimensions");
  TORCH_CHECK_VALUE(rank >= 1, "rank: expected at least 1, found ", rank);
  TORCH_CHECK_VALUE(oversample >= 0, "oversample: expected 0 or more, found ", oversample);
  TORCH_CHECK_VALUE(n_iter >= 0, "n_iter: expected 0 or more, found ", n_iter);
}

Factors randomized_svd_meta(const Tensor& a, int64_t rank, int64_t oversample, int64_t n_iter, int64_t) {
  check_svd(a, rank, oversample, n_iter);
  const auto m = a.sym_size(-2), n = a.sym_size(-1), k = m.min(n).min(rank);
  const auto shape = [&](std::initializer_list<c10::SymInt> last) {
    auto sizes = a.sym_sizes().slice(0, a.dim() - 2).vec();
    sizes.insert(sizes.end(), last);
    return sizes;
  };
  const auto options = a.options().dtype(arithmetic(a));
  return {a.new_empty_symint(shape({m, k}), options), a.new_empty_symint(shape({k}), options),
          a.new_empty_symint(shape({k, n}), options), a.new_empty_symint(shape({}), options.dtype(at::kDouble))};
}

#ifdef BALORA_WITH_CUDA
void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
}
#endif

at::Generator generator_of(const Tensor& a, int64_t seed) {
#ifdef BALORA_WITH_CUDA
  if (a.is_cuda()) {  // numbers drawn on the CPU would be waited for
    auto generator = at::cuda::detail::createCUDAGenerator(a.get_device());
    generator.set_current_seed(uint64_t(seed));
    return generator;
  }
#endif
  return at::detail::createCPUGenerator(uint64_t(seed));
}

// The largest |entry| of each matrix, NaN where there is one. a [batch, m, n] -> [batch, 1, 1].
Tensor largest(const Tensor& a) { return at::maximum(a.amax({-2, -1}, true), a.amin({-2, -1}, true).neg()); }

// Orthonormal rows that span those of Y [batch, l, m], by CholeskyQR in float64: see orthonormal in balora/spectral.py.
Tensor orthonormal(Tensor y, const at::Generator& generator, bool polish) {
  const auto width = y.size(1), m = y.size(2);
  const auto type = y.scalar_type();
  const bool single = type == at::kFloat;
  const double eps = single ? std::numeric_limits<float>::epsilon() : std::numeric_limits<double>::epsilon();
  const int shifted = single ? 1 : 3, plain = single ? 1 : 2;
  const auto size = largest(y);
  y = (y / size.masked_fill(size == 0, 1)).to(at::kDouble);
  if (polish) y.add_(at::randn({width, m}, generator, y.options()), eps);
  const auto eye = at::eye(width, y.options()).expand({y.size(0), width, width});
  const double shift = 2 * std::sqrt(double(m)) * std::numeric_limits<double>::epsilon();
  for (int step = 0; step < shifted + (polish ? plain : 0); ++step) {
    auto g = at::matmul(y, y.mT());
    if (step < shifted) {
      auto diagonal = g.diagonal(0, -2, -1);
      diagonal.add_(diagonal.sum(-1, true).clamp_min(1), shift);
    }
    const auto factor = std::get<0>(at::linalg_cholesky_ex(g));
    y = at::matmul(at::linalg_solve_triangular(factor, eye, /*upper=*/false), y);
  }
  return y.to(type);
}

// U, S, Vh of c [batch, l, l] in float64. On a CUDA device ATen would wait for it, and take one after the other.
std::tuple<Tensor, Tensor, Tensor> small_svd(const Tensor& c) {
#ifdef BALORA_WITH_CUDA
  if (c.is_cuda() && c.size(1) <= balora::LARGEST_SMALL) {
    const c10::cuda::CUDAGuard guard(c.device());
    const auto batch = c.size(0), width = c.size(1);
    const auto s = at::empty({batch, width}, c.options()), left = at::empty_like(c), right = at::empty_like(c);
    const auto memory = at::empty({balora::small_svd_bytes(batch, int(width))}, c.options().dtype(at::kByte));
    check(balora::small_svd(c.contiguous().const_data_ptr<double>(), batch, int(width), s.mutable_data_ptr<double>(),
                            left.mutable_data_ptr<double>(), right.mutable_data_ptr<double>(),
                            memory.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()),
          "small_svd");
    return {left.mT(), s, right};
  }
#endif
  return at::linalg_svd(c);
}

// By ATen on any device, of a [batch, m, n]. On a CUDA device nothing waits for it up to a width of 256.
Factors by_aten(Tensor a, int64_t rank, int64_t oversample, int64_t n_iter, int64_t seed) {
  const auto m = a.size(1), n = a.size(2), k = std::min({rank, m, n});
  const auto width = std::min({k + oversample, m, n});
  auto broken = largest(a).isfinite().logical_not();  // [batch, 1, 1]
  const auto squares = at::linalg_vector_norm(a, 2, -1, false, at::kDouble).square().sum(-1);
  if (a.is_cuda() || broken.any().item<bool>()) a = a.masked_fill(broken, 0);
  a = a.to(arithmetic(a));
  const auto generator = generator_of(a, seed);
  const auto omega = at::randn({width, n}, generator, a.options().dtype(at::kDouble)).to(a.scalar_type());
  auto q = orthonormal(at::matmul(omega, a.mT()), generator, n_iter == 0);  // [batch, l, m]
  for (int64_t i = 0; i < n_iter; ++i) {
    const auto p = orthonormal(at::matmul(q, a), generator, false);  // [batch, l, n]
    q = orthonormal(at::matmul(p, a.mT()), generator, i == n_iter - 1);
  }
  const auto b = at::matmul(q, a);  // [batch, l, n]
  const auto p = orthonormal(b, generator, true);
  // Entries near the end of float32 can overflow in a product: NaN, as for those that are not finite.
  const auto small = at::matmul(b.to(at::kDouble), p.to(at::kDouble).mT());  // [batch, l, l]
  broken.logical_or_(largest(small).isfinite().logical_not());
  auto [u, s, vh] = small_svd(small.masked_fill(broken, 0));
  u = u.to(a.scalar_type()), s = s.to(a.scalar_type()), vh = vh.to(a.scalar_type());
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  return {at::matmul(q.mT(), u.narrow(2, 0, k)).masked_fill_(broken, nan),
          s.narrow(1, 0, k).masked_fill(broken.squeeze(2), nan),
          at::matmul(vh.narrow(1, 0, k), p).masked_fill_(broken, nan),
          squares.masked_fill(broken.flatten(), nan)};
}

#ifdef BALORA_WITH_CUDA

bool has_kernels(const Tensor& a) { return a.is_cuda() && a.scalar_type() != at::kDouble; }

bool rows_are_contiguous(const Tensor& a) { return a.stride(2) == 1 || a.size(2) == 1; }

balora::Matrices matrices(const Tensor& a) {
  const auto type = a.scalar_type();
  return {a.const_data_ptr(),
          type == at::kFloat  ? balora::Type::float32
          : type == at::kHalf ? balora::Type::float16
                              : balora::Type::bfloat16,
          a.size(0),
          a.size(1),
          a.size(2),
          a.stride(0),
          a.stride(1)};
}

Factors by_kernels(Tensor a, int64_t k, int64_t width, int64_t n_iter, int64_t seed) {
  const c10::cuda::CUDAGuard guard(a.device());
  const bool transposed = !rows_are_contiguous(a) && (a.stride(1) == 1 || a.size(1) == 1);
  if (transposed) a = a.mT();
  if (!rows_are_contiguous(a)) a = a.contiguous();
  const auto batch = a.size(0), m = a.size(1), n = a.size(2);
  const auto options = a.options().dtype(at::kFloat);
  const auto u = at::empty({batch, m, k}, options), s = at::empty({batch, k}, options);
  const auto vh = at::empty({batch, k, n}, options), squares = at::empty({batch}, options.dtype(at::kDouble));
  const auto all = matrices(a);
  const auto bytes = balora::workspace_bytes(all, int(width));
  const auto workspace = at::empty({bytes}, options.dtype(at::kByte));  // aligned to 512 bytes
  check(balora::randomized_svd(all, int(k), int(width), int(n_iter), uint64_t(seed), u.mutable_data_ptr<float>(),
                               s.mutable_data_ptr<float>(), vh.mutable_data_ptr<float>(),
                               squares.mutable_data_ptr<double>(), workspace.mutable_data_ptr(), bytes,
                               c10::cuda::getCurrentCUDAStream()),
        "randomized_svd");
  if (transposed) return {vh.mT(), s, u.mT(), squares};
  return {u, s, vh, squares};
}

Tensor update_by_kernel(Tensor z, const Tensor& u, const Tensor& weights, const Tensor& vh, const Tensor& multiple) {
  const c10::cuda::CUDAGuard guard(z.device());
  if (!rows_are_contiguous(z)) z = z.contiguous();
  const auto out = at::empty(z.sizes(), z.options());
  check(balora::low_rank_update(matrices(z), int(u.size(2)), u.const_data_ptr<float>(), weights.const_data_ptr<float>(),
                                vh.const_data_ptr<float>(), multiple.const_data_ptr<float>(), out.mutable_data_ptr(),
                                c10::cuda::getCurrentCUDAStream()),
        "low_rank_update");
  return out;
}

#endif

Factors randomized_svd(const Tensor& a, int64_t rank, int64_t oversample, int64_t n_iter, int64_t seed) {
  const Plain plain;
  check_svd(a, rank, oversample, n_iter);
  const auto m = a.size(-2), n = a.size(-1), k = std::min({rank, m, n});
  TORCH_CHECK_VALUE(m >= 1 && n >= 1, "a: expected m and n of at least 1, found ", a.sizes());
  const auto flat = a.reshape({-1, m, n});
  const auto leading = a.sizes().slice(0, a.dim() - 2);
  const auto shaped = [&](const Tensor& flat, std::initializer_list<int64_t> last) {
    auto sizes = leading.vec();
    sizes.insert(sizes.end(), last);
    return flat.reshape(sizes).contiguous();
  };
  const auto factors = [&]() -> Factors {
#ifdef BALORA_WITH_CUDA
    const auto width = std::min({k + oversample, m, n});
    if (has_kernels(a) && width <= balora::LARGEST_WIDTH && flat.size(0) > 0)
      return by_kernels(flat, k, width, n_iter, seed);
#endif
    return by_aten(flat, rank, oversample, n_iter, seed);
  }();
  const auto& [u, s, vh, squares] = factors;
  return {shaped(u, {m, k}), shaped(s, {k}), shaped(vh, {k, n}), shaped(squares, {})};
}

Tensor low_rank_update_meta(const Tensor& z, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  return z.new_empty_symint(z.sym_sizes());
}

Tensor low_rank_update(const Tensor& z, const Tensor& u, const Tensor& weights, const Tensor& vh,
                       const Tensor& multiple) {
  const Plain plain;
  check_type("z", z);
  TORCH_CHECK_VALUE(z.dim() >= 2 && u.dim() == z.dim(), "z: expected the shape [..., m, n] and u [..., m, k], found ",
                    z.sizes(), " and ", u.sizes());
  const auto type = arithmetic(z);
  const auto m = z.size(-2), n = z.size(-1), k = u.size(-1);
  const auto leading = z.sizes().slice(0, z.dim() - 2);
  const auto checked = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> last) {
    auto sizes = leading.vec();
    sizes.insert(sizes.end(), last);
    TORCH_CHECK_VALUE(t.sizes() == sizes, name, ": expected the shape ", at::IntArrayRef(sizes), ", found ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == type, name, ": expected ", type, " with z in ", z.scalar_type(), ", found ",
                     t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == z.device(), name, ": expected z's device ", z.device(), ", found ", t.device());
  };
  checked("u", u, {m, k});
  checked("weights", weights, {k});
  checked("vh", vh, {k, n});
  checked("multiple", multiple, {});
#ifdef BALORA_WITH_CUDA
  if (has_kernels(z) && z.numel() > 0 && k <= balora::LARGEST_WIDTH) {
    const auto out = update_by_kernel(z.reshape({-1, m, n}), u.reshape({-1, m, k}).contiguous(),
                                      weights.reshape({-1, k}).contiguous(), vh.reshape({-1, k, n}).contiguous(),
                                      multiple.reshape({-1}).contiguous());
    return out.view(z.sizes());
  }
#endif
  auto out = at::matmul(u * weights.unsqueeze(-2), vh);
  out.addcmul_(z.to(type), multiple.unsqueeze(-1).unsqueeze(-1));
  return out.to(z.scalar_type()).contiguous();
}

void register_operators(torch::Library& library) {
  library.def(
      "randomized_svd(Tensor a, int rank, int oversample, int n_iter, int seed) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("low_rank_update(Tensor z, Tensor u, Tensor weights, Tensor vh, Tensor multiple) -> Tensor");
  library.impl("randomized_svd", torch::dispatch(c10::DispatchKey::Meta, TORCH_FN(randomized_svd_meta)));
  library.impl("low_rank_update", torch::dispatch(c10::DispatchKey::Meta, TORCH_FN(low_rank_update_meta)));
  library.impl("randomized_svd", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(randomized_svd)));
  library.impl("low_rank_update", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(low_rank_update)));
#ifdef BALORA_WITH_CUDA
  library.impl("randomized_svd", torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(randomized_svd)));
  library.impl("low_rank_update", torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(low_rank_update)));
#endif
}

// setup.py defines BALORA_TORCH, and BALORA_ARCHITECTURES or BALORA_WITHOUT_CUDA (the reason).
pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = BALORA_TORCH;
#ifdef BALORA_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = BALORA_ARCHITECTURES;
  info["without_cuda"] = pybind11::none();
#else
  info["cuda"] = pybind11::none();
  info["architectures"] = pybind11::none();
  info["without_cuda"] = BALORA_WITHOUT_CUDA;
#endif
  return info;
}

}  // namespace

// What TORCH_LIBRARY_FRAGMENT does while a library is loaded happens here, after a look at the version: another torch
// may have the same symbols for other layouts.
PYBIND11_MODULE(_C, module) {
  const auto found = pybind11::module_::import("torch").attr("__version__").cast<std::string>();
  if (found != BALORA_TORCH) {
    throw pybind11::import_error("it was built for torch " BALORA_TORCH ", this is torch " + found);
  }
  static torch::Library library(torch::Library::FRAGMENT, "balora", std::nullopt, __FILE__, __LINE__);
  register_operators(library);
  module.def("build_info", &build_info);
}
