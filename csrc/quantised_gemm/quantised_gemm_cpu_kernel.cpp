// Tasks take a panel of columns for up to 256 rows of an expert. Few rows, as in decoding: the numbers are multiplied
// as they are read and their sums scaled, which takes the time of reading them. More: the panel is dequantised into
// operands, slab by slab.
#include "grouped_gemm/epilogue.hpp"
#include "grouped_gemm/few_rows.hpp"
#include "grouped_gemm/products.hpp"
#include "quantised_gemm/byte_rows.hpp"
#include "quantised_gemm/panel.hpp"

namespace mfx::MFX_ISA {
namespace {

inline constexpr std::int64_t kDequantisedRows = 256;  // of a panel at once: its operands stay in the L1 or L2 cache
static_assert(kDequantisedRows % kQuantisedGroup == 0);

template <int kBits>
class QuantisedReader {
 public:
  explicit QuantisedReader(const QuantisedGemmParams& p)
      : weight_(p.weight),
        panels_((p.out_features + kPanel - 1) / kPanel),
        groups_(kBits == 8 ? 1 : (p.in_features + kQuantisedGroup - 1) / kQuantisedGroup),
        byte_rows_(kBits == 8 ? p.in_features : groups_ * kQuantisedGroup / 2) {}

  PanelReader<kBits> panel(std::int64_t expert, std::int64_t index) const {
    const std::int64_t panel = expert * panels_ + index;
    return {weight_.values + panel * byte_rows_ * kPanel,
            static_cast<const typename PanelReader<kBits>::Scale*>(weight_.scales) + panel * groups_ * kPanel};
  }

 private:
  const QuantisedMatrices& weight_;
  std::int64_t panels_, groups_, byte_rows_;
};

// f(block, panel of a part) for all of them, in parallel.
template <typename F>
void for_panels(const std::vector<ExpertBlock>& blocks, std::int64_t panels, F f) {
  parallel_tasks(static_cast<std::int64_t>(blocks.size()) * panels,
                 [&](std::int64_t task) { f(blocks[static_cast<std::size_t>(task / panels)], task % panels); });
}

template <int kBits, int kParts, typename T, typename Epilogue>
void multiply_few(const QuantisedGemmParams& p, Epilogue epilogue) {
  const QuantisedReader<kBits> weight(p);
  const std::int64_t columns = p.out_features / kParts, panels = (columns + kPanel - 1) / kPanel;
  const std::int64_t stride = round_up(p.in_features, kQuantisedGroup), num_rests = stride / kRestRows,
                     num_groups = stride / kQuantisedGroup;
  // Of a token once, whatever the number of its experts.
  const bool by_token = p.x.order == RowOrder::kToken;
  const std::int64_t rows = by_token ? p.layout.num_tokens : p.layout.num_slots();
  const RowReader<T> at_position(p.x, p.layout);
  const auto row_of = [&](std::int64_t i) {
    return by_token ? static_cast<const T*>(p.x.data) + i * p.x.stride : at_position(i);
  };
  const Scratch<float> factors(rows * stride);
  constexpr bool kInBytes = kHasByteProducts && kBits == 4 && sizeof(T) == 2;
  const Scratch<std::int32_t> words(kInBytes ? rows * stride : 0), byte_rests(kInBytes ? rows * num_groups : 0);
  const Scratch<float> rests(kInBytes ? rows * num_groups : kBits == 4 ? rows * num_rests : 0);
  const ByteRows in_bytes = {words.data(), rests.data(), byte_rests.data(), stride};
  parallel_for(rows, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      float* const x = factors.data() + i * stride;
      pack_row(row_of(i), p.in_features, stride, x);
      if constexpr (kInBytes) {
        in_bytes.fill(i, x);
      } else if constexpr (kBits == 4) {
        make_factors(x, stride, rests.data() + i * num_rests);
      }
    }
  });
  const PanelRows x = {factors.data(), stride, rests.data(), by_token ? p.layout.slot_order : nullptr,
                       static_cast<std::int32_t>(p.layout.num_choices)};
  for_panels(expert_blocks(p.layout, kFewRows), panels, [&](const ExpertBlock& block, std::int64_t panel) {
    float* const c = static_cast<float*>(thread_scratch(kParts * block.rows * kPanel * sizeof(float)));
    float* parts[2] = {};
    for (int part = 0; part < kParts; ++part) {
      parts[part] = c + part * block.rows * kPanel;
      const PanelReader<kBits> reader = weight.panel(block.expert, part * panels + panel);
      if constexpr (kInBytes) {
        multiply_panel_bytes(
            reader, p.in_features, block.rows, in_bytes, [&](std::int64_t r) { return x.row(block.begin + r); },
            parts[part]);
      } else {
        multiply_panel(reader, p.in_features, block.rows, x, block.begin, parts[part]);
      }
    }
    const std::int64_t n = panel * kPanel;
    epilogue({block.expert, block.begin, block.rows, n, static_cast<int>(std::min<std::int64_t>(kPanel, columns - n))},
             parts);
  });
}

template <int kBits, int kParts, typename T, typename Op, typename Epilogue>
void multiply_many(const QuantisedGemmParams& p, Epilogue epilogue) {
  const QuantisedReader<kBits> weight(p);
  const std::int64_t columns = p.out_features / kParts, panels = (columns + kPanel - 1) / kPanel;
  const std::int64_t depth = round_up(p.in_features, kInterleave<Op>);
  const Operand<Op> a = gather_operand<T, Op>(p.layout, p.x, p.in_features);
  for_panels(expert_blocks(p.layout, kBlockRows), panels, [&](const ExpertBlock& block, std::int64_t panel) {
    const std::int64_t n = panel * kPanel, c_size = block.rows * kPanel;
    const int used = static_cast<int>(std::min<std::int64_t>(kPanel, columns - n));
    float* const c = static_cast<float*>(thread_scratch(static_cast<std::size_t>(kParts * c_size) * sizeof(float) +
                                                        kDequantisedRows * kPanel * sizeof(Op)));
    Op* const b = reinterpret_cast<Op*>(c + kParts * c_size);
    const BrgemmScope scope;
    for (std::int64_t k0 = 0; k0 < depth; k0 += kDequantisedRows) {
      const std::int64_t k = std::min(kDequantisedRows, depth - k0);
      for (int part = 0; part < kParts; ++part) {
        dequantise_panel(weight.panel(block.expert, part * panels + panel), k0, std::min(k, p.in_features - k0), k, b);
        for_row_pieces<Op>(block.rows, [&](std::int64_t row, std::int64_t rows) {
          tile_gemm(rows, round_up(used, kPad), k, a.data + (block.begin + row) * a.stride + k0, a.stride, b, kPanel,
                    c + part * c_size + row * kPanel, kPanel, k0 > 0);
        });
      }
    }
    for_row_pieces<Op>(block.rows, [&](std::int64_t row, std::int64_t rows) {
      float* parts[2] = {c + row * kPanel, c + (kParts - 1) * c_size + row * kPanel};
      epilogue({block.expert, block.begin + row, rows, n, used}, parts);
    });
  });
}

template <typename T, typename Op>
void multiply(const QuantisedGemmParams& p) {
  const std::int64_t columns = p.activation.gated ? p.out_features / 2 : p.out_features;
  const RowTarget<T> target(p.layout, p.out_order, p.out, columns, columns, p.gates);
  const auto epilogue = [&](const BlockAt& at, float* const* parts) {
    if (p.activation.function != Activation::kNone) activate_block(p.activation, at.rows, at.columns, parts);
    target.write(at, parts[0]);
  };
  const auto run = [&]<int kBits, int kParts>() {
    if (has_few_rows(p.layout)) {
      multiply_few<kBits, kParts, T>(p, epilogue);
    } else {
      multiply_many<kBits, kParts, T, Op>(p, epilogue);
    }
  };
  const bool gated = p.activation.gated;
  if (p.weight.bits == 8) {
    gated ? run.template operator()<8, 2>() : run.template operator()<8, 1>();
  } else {
    gated ? run.template operator()<4, 2>() : run.template operator()<4, 1>();
  }
  target.finish();
}

}  // namespace

void quantised_gemm(const QuantisedGemmParams& p) {
  dispatch_types(p.dtype, [&]<typename T, typename Op>() {
    if constexpr (!std::is_same_v<T, double>) multiply<T, Op>(p);
  });
}

}  // namespace mfx::MFX_ISA
