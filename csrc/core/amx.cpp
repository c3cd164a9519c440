#include "core/amx.hpp"

#if defined(__x86_64__) && defined(__linux__)
#define MFX_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>

namespace mfx {

#if defined(MFX_AMX)
namespace {

#define MFX_AMX_CODE __attribute__((target("amx-tile,amx-bf16")))

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row: 16 floats, or 32 bf16 of A, or 16 pairs of B
constexpr int kTileDepth = 32;  // of k in one tile product

// Tiles 0 to 3 are the sums of a block of 32 x 32, 4 and 5 its rows of A, 6 and 7 its columns of B.
struct TileShape {
  int rows[2];  // of the block's upper and lower half
  int depth;
  bool operator==(const TileShape&) const = default;
};

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

thread_local TileShape configured{};

MFX_AMX_CODE void configure(TileShape shape) {
  if (shape == configured) return;
  TileConfig config;
  const auto set = [&](int tile, int rows, int bytes) {
    config.rows[tile] = static_cast<std::uint8_t>(rows);
    config.row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  };
  for (int half = 0; half < 2; ++half) {
    set(2 * half, shape.rows[half], kTileBytes);
    set(2 * half + 1, shape.rows[half], kTileBytes);
    set(4 + half, shape.rows[half], 2 * shape.depth);
    set(6 + half, shape.depth / 2, kTileBytes);
  }
  asm volatile("" : : "r"(&config) : "memory");  // gcc's intrinsic claims to read 8 bytes of it
  _tile_loadconfig(&config);
  configured = shape;
}

// One block of sums: kHalves x 16 rows (fewer where configured so), kColumns x 16 columns.
template <int kHalves, int kColumns>
MFX_AMX_CODE void multiply_block(std::int64_t k, const BFloat16* a, std::int64_t lda, const BFloat16* b,
                                 std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
  float* const lower = c + kTileRows * ldc;
  const std::int64_t a_bytes = 2 * lda, b_bytes = 4 * ldb, c_bytes = 4 * ldc;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kColumns == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kHalves == 2) _tile_loadd(2, lower, c_bytes);
    if constexpr (kHalves == 2 && kColumns == 2) _tile_loadd(3, lower + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumns == 2) _tile_zero(1);
    if constexpr (kHalves == 2) _tile_zero(2);
    if constexpr (kHalves == 2 && kColumns == 2) _tile_zero(3);
  }
  for (std::int64_t l = 0; l < k; l += kTileDepth) {
    _tile_loadd(6, b + l * ldb, b_bytes);
    _tile_loadd(4, a + l, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kHalves == 2) {
      _tile_loadd(5, a + kTileRows * lda + l, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + l * ldb + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kHalves == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kHalves == 2) _tile_stored(2, lower, c_bytes);
  if constexpr (kHalves == 2 && kColumns == 2) _tile_stored(3, lower + 16, c_bytes);
}

// k is a multiple of `depth`.
void multiply(std::int64_t m, std::int64_t n, std::int64_t k, int depth, const BFloat16* a, std::int64_t lda,
              const BFloat16* b, std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
  for (std::int64_t i = 0; i < m; i += 2 * kTileRows, a += 2 * kTileRows * lda, c += 2 * kTileRows * ldc) {
    const int upper = static_cast<int>(std::min<std::int64_t>(kTileRows, m - i));
    const int lower = static_cast<int>(std::clamp<std::int64_t>(m - i - kTileRows, 0, kTileRows));
    configure({{upper, lower > 0 ? lower : kTileRows}, depth});
    for (std::int64_t j = 0; j < n; j += 32) {
      const bool wide = n - j > 16;
      const auto block = lower > 0 ? (wide ? multiply_block<2, 2> : multiply_block<2, 1>)
                                   : (wide ? multiply_block<1, 2> : multiply_block<1, 1>);
      block(k, a, lda, b + 2 * j, ldb, c + j, ldc, accumulate);
    }
  }
}

bool processor_has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBf16) != 0 && (edx & kTile) != 0;
}

// The tiles are 8 KiB of state that Linux saves only for processes that have asked for them.
bool system_grants_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool amx_available() {
  static const bool available = processor_has_amx() && system_grants_amx();
  return available;
}

void amx_gemm(std::int64_t m, std::int64_t n, std::int64_t k, const BFloat16* a, std::int64_t lda, const BFloat16* b,
              std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
  asm volatile("" : : : "memory");  // gcc's intrinsics do not say that tile loads read memory
  const std::int64_t whole = k / kTileDepth * kTileDepth;
  if (whole > 0) multiply(m, n, whole, kTileDepth, a, lda, b, ldb, c, ldc, accumulate);
  if (whole < k) {
    multiply(m, n, k - whole, static_cast<int>(k - whole), a + whole, lda, b + whole * ldb, ldb, c, ldc,
             accumulate || whole > 0);
  }
}

void amx_forget() {
  configured = {};
}

MFX_AMX_CODE void amx_release() {
  _tile_release();
  amx_forget();
}

#else

bool amx_available() {
  return false;
}
void amx_gemm(std::int64_t, std::int64_t, std::int64_t, const BFloat16*, std::int64_t, const BFloat16*, std::int64_t,
              float*, std::int64_t, bool) {
  std::abort();  // never called
}
void amx_forget() {}
void amx_release() {}

#endif

}  // namespace mfx
