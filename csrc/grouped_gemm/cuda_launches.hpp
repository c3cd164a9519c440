// The steps that the CUDA launchers of grouped_gemm and expert_ffn are made of.
#pragma once

#include "core/workspace.hpp"
#include "grouped_gemm/kernel_params.cuh"

namespace mfx::grouped {

// Most partial sums that dots over `columns` have: one per warp's columns of the narrowest tile.
inline std::int64_t num_dots(const RoutedLayout& layout, std::int64_t columns) {
  return (columns + 31) / 32 * layout.num_slots();
}

inline bool sums_choices(const RoutedLayout& layout, RowOrder order) {
  return order == RowOrder::kToken && layout.num_choices > 1;
}

bool any(const RoutedMatrices& matrices, std::int64_t n);

// Launches on one stream, for one layout and dtype. After a failure nothing further is launched.
class Launches {
 public:
  Launches(DType dtype, bool allow_tf32, const RoutedLayout& layout, Stream stream);

  Status status() const { return {status_.message, slow_, status_.refused}; }

  RowMap map(const RoutedRows& rows) { return map(rows, element_size(dtype_)); }
  // Contiguous rows of `columns` elements.
  RowMap map(void* data, RowOrder order, std::int64_t columns) {
    return map(data, order, columns, element_size(dtype_));
  }
  // Where a product's rows go: contiguous to `out`, times their gates (or null), or, with `rows`, there for combine().
  void write_to(RowProductParams* product, void* out, RowOrder order, const void* gates, float* rows);
  // Refuses matrices that are larger than the kernels count.
  void require_features(std::int64_t rows, std::int64_t columns);
  // [rows, columns] matrices.
  ExpertMatrices matrices(const RoutedMatrices& matrices, std::int64_t rows, std::int64_t columns);

  // rows, depth, matrices, columns and what the product's way out needs are the caller's; the rest is filled in.
  // With grad_gates, the dots and those of the biases (or null) are summed into it.
  void row_product(Product product, RowProductParams params, void* grad_gates = nullptr,
                   const float* bias_dots = nullptr);
  // Another op's forward product, by its own kernels: `params` are theirs, `product` the part of them that is as above.
  void forward_product(const Instances& table, RowProductParams* product, std::int64_t matrix_columns,
                       const void* params);
  void weight_grad(const RowMap& x, const RowMap& grad, const RoutedMatrices& grad_weight, std::int64_t in_features,
                   std::int64_t out_features);
  // out <- sum over the choices of gates * rows, which a product was told to write; nothing without rows.
  void combine(const float* rows, const void* gates, void* out, std::int64_t columns);
  void scale(const RowMap& x, const void* gates, char* to, std::int64_t columns);
  void activation_grad(const ActivationGradRows& rows, const RowMap& grad, const void* gates, void* grad_gates);
  // Nothing where `to` is null.
  void bias_dots(const RowMap& grad, const void* bias, float* to, std::int64_t columns);
  void bias_grad(const RowMap& grad, const void* gates, void* to, std::int64_t columns);

 private:
  RowMap map(const RoutedRows& rows, std::int64_t element_bytes);
  RowMap map(void* data, RowOrder order, std::int64_t columns, std::int64_t element_bytes);
  // Whether 16 bytes at a time can be read and written, because all lies at multiples of them:
  bool aligned(const RowMap& map) const;                       // every row
  bool aligned(const ExpertMatrices& matrices) const;          // every row of every matrix
  bool aligned(std::int64_t columns) const;                    // contiguous rows, if the first one does
  bool aligned(const void* data, std::int64_t columns) const;  // contiguous rows from here on
  // `mapped`: TMA can be told where the product's matrices lie.
  const ProductInstance& choose(Product product, bool transposed, bool aligned, bool mapped);
  const ProductInstance& choose_from(const Instances& table, Product product, bool transposed, bool aligned);
  void describe_layout(RowProductParams* params) const;
  // Of a persistent grid over all tiles of rows by so many columns of the matrices.
  std::int64_t row_blocks(const ProductInstance& instance, std::int64_t columns) const;
  void launch_product(const ProductInstance& instance, std::int64_t blocks, const void* params);
  int pointwise_blocks(std::int64_t rows) const;
  // Refuses more; `what` reads "<argument> must ...".
  void require_at_most(std::int64_t most, std::int64_t got, const char* what);

  DType dtype_;
  Instances instances_, hopper_instances_;
  const RoutedLayout& layout_;
  Stream stream_;
  int processors_ = 0, capability_ = 0;
  Status status_;
  const char* slow_ = nullptr;
};

}  // namespace mfx::grouped
