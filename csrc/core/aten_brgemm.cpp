#include <ATen/native/CPUBlas.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "core/amx.hpp"
#include "core/brgemm.hpp"

namespace mfx {
namespace {

const at::BFloat16* as_aten(const BFloat16* p) {
  return reinterpret_cast<const at::BFloat16*>(p);
}

bool wanted(const char* choice) {
  const char* value = std::getenv("MFX_BRGEMM");
  return value != nullptr && std::strcmp(value, choice) == 0;
}

bool use_amx() {
  static const bool use = amx_available() && !wanted("0") && !wanted("aten");
  return use;
}

// brgemm is an internal of ATen: a newer torch may change its mind about a dtype or a processor, so ask it for a
// product of small integers, which every dtype here holds exactly, and believe only the right answer.
template <typename T, typename Make>
bool probe(Make make, bool vnni) {
  constexpr std::int64_t m = 3, n = 16, k = 4;
  if (wanted("0")) return false;
  std::vector<T> a(m * k), b(k * n);
  std::vector<float> c(m * n, std::nanf(""));
  for (std::int64_t i = 0; i < m * k; ++i) a[i] = make(static_cast<float>(i % 5 - 2));
  for (std::int64_t i = 0; i < k * n; ++i) {
    const std::int64_t row = i / n, column = i % n;
    b[vnni ? (row / 2) * 2 * n + 2 * column + row % 2 : i] = make(static_cast<float>((row + 3 * column) % 7 - 3));
  }
  try {
    at::native::cpublas::brgemm(m, n, k, k, n, n, false, a.data(), b.data(), c.data(), vnni);
    at::native::cpublas::brgemm(m, n, k, k, n, n, true, a.data(), b.data(), c.data(), vnni);
    at::native::cpublas::brgemm_release(vnni);
  } catch (const std::exception&) {
    return false;
  }
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      std::int64_t sum = 0;
      for (std::int64_t l = 0; l < k; ++l) sum += ((i * k + l) % 5 - 2) * ((l + 3 * j) % 7 - 3);
      if (c[i * n + j] != static_cast<float>(2 * sum)) return false;
    }
  }
  return true;
}

}  // namespace

bool brgemm_available_f32() {
  static const bool available = probe<float>([](float x) { return x; }, false);
  return available;
}

bool brgemm_available_bf16() {
  static const bool available = use_amx() || probe<at::BFloat16>([](float x) { return at::BFloat16(x); }, true);
  return available;
}

bool slow_in_torch(DType dtype) {
#if defined(__x86_64__)
  static const bool has_f16 = probe<at::Half>([](float x) { return at::Half(x); }, true);
  return (dtype == DType::kBFloat16 && !brgemm_available_bf16()) || (dtype == DType::kFloat16 && !has_f16);
#else
  static_cast<void>(dtype);
  return false;
#endif
}

void brgemm(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda, const float* b,
            std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, /*is_vnni=*/false);
  if (use_amx()) amx_forget();  // oneDNN gives all tiles back when it changes kernels
}

void brgemm(std::int64_t m, std::int64_t n, std::int64_t k, const BFloat16* a, std::int64_t lda, const BFloat16* b,
            std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
  if (use_amx()) return amx_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, as_aten(a), as_aten(b), c, /*is_vnni=*/true);
}

BrgemmScope::~BrgemmScope() {
  if (use_amx()) {
    amx_release();
  } else if (brgemm_available_bf16()) {
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  }
}

}  // namespace mfx
