// Cross-entropy of logits = x weight^T that never exist as a whole: products of torch's for a chunk of rows at a time.
// There are no kernels of our own, so that every device has it, and no header beside this file.
//
// Where the loss is one number, its gradients are made in the forward pass, while a chunk's probabilities are at hand,
// and backward multiplies them by the gradient of the loss: three products of rows, features and classes, as in the
// plain form. A loss for each row is not known by one factor, and float16 has no room for gradients without the scale
// that only backward brings: these compute the chunks again in backward, four products.
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/autograd.hpp"
#include "bindings/op.hpp"
#include "core/brgemm.hpp"

namespace mfx {
namespace {

constexpr const char* kOp = "linear_cross_entropy";

struct Args {
  at::Tensor x, weight, target;
  int64_t ignore_index;
  std::string reduction;
  double z_loss;
};
struct ForwardArgs {
  Args args;
  bool needs_x, needs_weight;
};
struct Saved {
  at::Tensor grad_x, grad_weight;
};
struct BackwardArgs {
  at::Tensor grad;
  Args args;
  Saved saved;
  bool needs_x, needs_weight;
};
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor>;

constexpr double kMostZLoss = 1e38;  // twice it is finite in float32

void check_arguments(const Args& a) {
  const auto& [x, weight, target, ignore_index, reduction, z_loss] = a;
  check_float_dtype(kOp, "x", x);
  MFX_CHECK_ARG(x.dim() >= 1, kOp, "x", "be [..., features]", "shape ", x.sym_sizes());
  check_projection(kOp, "weight", weight, "classes", "features", x);
  MFX_CHECK_ARG(weight.sym_size(0) > 0, kOp, "weight", "have at least one class", "shape ", weight.sym_sizes());
  check_tensor(kOp, "target", target, x.sym_sizes().slice(0, x.dim() - 1), at::kLong, "x", x);
  MFX_CHECK_ARG(reduction == "mean" || reduction == "sum" || reduction == "none", kOp, "reduction",
                "be 'mean', 'sum' or 'none'", "'", reduction, "'");
  MFX_CHECK_ARG(z_loss >= 0 && z_loss <= kMostZLoss, kOp, "z_loss", c10::str("be in [0, ", kMostZLoss, "]"), z_loss);
}

// Whether the forward pass makes the gradients.
bool saves_gradients(const Args& a) {
  return a.reduction != "none" && a.x.scalar_type() != at::kHalf;
}

at::Tensor empty_gradient(const at::Tensor& like, bool wanted) {
  return wanted ? at::empty_symint(like.sym_sizes(), like.options()) : no_tensor(like);
}

// The classes of the rows, 0 for those that do not count.
struct Targets {
  at::Tensor classes, counted;

  explicit Targets(const Args& a) {
    const at::Tensor target = a.target.reshape({-1});
    counted = target != a.ignore_index;
    classes = target.masked_fill(counted.logical_not(), 0);
    // On a GPU torch's gather asserts it there: asking here would wait for the GPU.
    if (!target.is_cpu() || target.numel() == 0) return;
    const auto [least, most] = classes.aminmax();
    const int64_t num_classes = a.weight.size(0);
    for (const int64_t found : {least.item<int64_t>(), most.item<int64_t>()}) {
      MFX_CHECK_ARG(found >= 0 && found < num_classes, kOp, "target",
                    c10::str("lie in [0, ", num_classes, ") or be ignore_index = ", a.ignore_index), found);
    }
  }
};

// Rows of a chunk. Its logits shall take less memory than the weight, and its share of the weight's gradient shall cost
// little beside the product: a quarter as many rows as features will do, but as many where the gradient is rounded, for
// it then takes another pass over float32 sums. More where there are few classes.
int64_t rows_of_chunk(int64_t num_rows, int64_t features, int64_t classes, bool rounds) {
  constexpr int64_t kLeastRows = 128, kLeastLogits = 1 << 22;
  const int64_t most = std::max({rounds ? features : features / 4, kLeastRows, kLeastLogits / classes});
  const int64_t chunks = std::max<int64_t>((num_rows + most - 1) / most, 1);
  return std::max<int64_t>((num_rows + chunks - 1) / chunks, 1);
}

// Adds a chunk's share, gradients [R, V]^T x [R, D], to the float32 sums of a narrower weight's gradient: some classes
// at a time, so that what is rounded takes little memory.
void add_rounded_product(at::Tensor& sums, const at::Tensor& gradients, const at::Tensor& x) {
  constexpr int64_t kAtOnce = 1 << 22;
  const int64_t classes = sums.size(0), step = std::max<int64_t>(kAtOnce / std::max<int64_t>(sums.size(1), 1), 1);
  for (int64_t begin = 0; begin < classes; begin += step) {
    const int64_t some = std::min(step, classes - begin);
    sums.narrow(0, begin, some).add_(at::mm(gradients.narrow(1, begin, some).t(), x));
  }
}

// In: logits [R, V] and classes [R, 1]. Out: losses [R] and, if factors [R, 1] are given, in place of the logits
// their gradients when each loss is multiplied by its factor.
void rows_of_logits(at::Tensor logits, const at::Tensor& classes, const at::Tensor& factors, double z_loss,
                    at::Tensor losses) {
  const at::Tensor most = logits.amax(1, /*keepdim=*/true);
  const at::Tensor chosen = logits.gather(1, classes).sub_(most);
  const at::Tensor sum = logits.sub_(most).exp_().sum(1, /*keepdim=*/true);
  const at::Tensor log_sum = sum.log();
  at::Tensor loss = log_sum - chosen, slope;
  if (z_loss > 0) {
    const at::Tensor logsumexp = log_sum + most;
    loss.add_(logsumexp.square(), z_loss);
    slope = logsumexp.mul_(2 * z_loss).add_(1);
  }
  losses.copy_(loss.squeeze(1));
  if (!factors.defined()) return;
  logits.mul_((slope.defined() ? factors * slope : factors) / sum);
  logits.scatter_(1, classes, logits.gather(1, classes).sub_(factors));
}

// Losses [N] of all rows (not masked) and, if factors [N] are given, the gradients that are wanted.
Forward in_chunks(const Args& a, const Targets& targets, const at::Tensor& factors, bool needs_x, bool needs_weight) {
  const at::Tensor x = a.x.reshape({a.target.numel(), a.x.size(-1)});
  const at::Tensor& weight = a.weight;
  const int64_t num_rows = x.size(0), classes = weight.size(0), features = weight.size(1);
  const at::ScalarType sums = result_type(x);
  if (x.is_cpu() && slow_in_torch(check_float_dtype(kOp, "x", x))) {  // in float32, rounded at the end
    Args wide = a;
    wide.x = a.x.to(sums);
    wide.weight = weight.to(sums);
    const auto [losses, grad_x, grad_weight] = in_chunks(wide, targets, factors, needs_x, needs_weight);
    return {losses, grad_x.to(x.scalar_type()), grad_weight.to(x.scalar_type())};
  }
  const auto options = x.options().dtype(sums);
  const bool rounds = x.scalar_type() != sums;
  at::Tensor losses = at::empty({num_rows}, options);
  at::Tensor grad_x = needs_x ? at::empty({num_rows, features}, x.options()) : at::Tensor();
  at::Tensor grad_weight = needs_weight && num_rows == 0 ? at::zeros_like(weight) : at::Tensor();
  const int64_t most_rows = rows_of_chunk(num_rows, features, classes, rounds);
  const at::Tensor logits_of_chunk = at::empty({std::min(most_rows, num_rows), classes}, options);
  const at::Tensor rounded_of_chunk = rounds ? at::empty_like(logits_of_chunk, x.options()) : at::Tensor();
  // Elementwise steps on the CPU go over rows that stay in a core's cache.
  constexpr int64_t kLogitsAtOnce = 1 << 18;
  const int64_t at_once = x.is_cpu() ? std::max<int64_t>(kLogitsAtOnce / classes, 1) : most_rows;

  for (int64_t begin = 0; begin < num_rows; begin += most_rows) {
    const int64_t rows = std::min(most_rows, num_rows - begin);
    const at::Tensor x_rows = x.narrow(0, begin, rows);
    at::Tensor logits = logits_of_chunk.narrow(0, 0, rows);
    at::Tensor products = rounds ? rounded_of_chunk.narrow(0, 0, rows) : logits;
    at::mm_out(products, x_rows, weight.t());
    for (int64_t row = 0; row < rows; row += at_once) {
      const int64_t some = std::min(at_once, rows - row);
      at::Tensor part = logits.narrow(0, row, some);
      if (rounds) part.copy_(products.narrow(0, row, some));
      rows_of_logits(part, targets.classes.narrow(0, begin + row, some).unsqueeze(1),
                     factors.defined() ? factors.narrow(0, begin + row, some).unsqueeze(1) : at::Tensor(), a.z_loss,
                     losses.narrow(0, begin + row, some));
      if (rounds && factors.defined()) products.narrow(0, row, some).copy_(part);
    }
    if (!factors.defined()) continue;
    if (needs_x) {
      at::Tensor out = grad_x.narrow(0, begin, rows);
      at::mm_out(out, products, weight);
    }
    if (!needs_weight) continue;
    if (rounds && rows < num_rows) {
      if (begin == 0) grad_weight = at::zeros({classes, features}, options);
      add_rounded_product(grad_weight, products, x_rows);
    } else if (begin == 0) {
      grad_weight = at::mm(products.t(), x_rows);
    } else {
      grad_weight.addmm_(products.t(), x_rows);
    }
  }
  return {losses, needs_x ? grad_x.view_as(a.x) : no_tensor(x),
          needs_weight && grad_weight.defined() ? grad_weight.to(x.scalar_type()) : no_tensor(x)};
}

// What the gradient of the loss makes of each row's: [N].
at::Tensor row_factors(const Args& a, const Targets& targets, const at::Tensor& grad) {
  const at::Tensor counted = targets.counted.to(result_type(a.x));
  if (a.reduction == "none") return counted * grad.reshape({-1});
  return counted * (a.reduction == "mean" ? grad / counted.sum().clamp_min(1) : grad);
}

template <bool kMeta>
Forward forward(const ForwardArgs& f) {
  const Args& a = f.args;
  check_arguments(a);
  const bool saves = saves_gradients(a), needs_x = saves && f.needs_x, needs_weight = saves && f.needs_weight;
  const auto options = a.x.options().dtype(result_type(a.x));
  if constexpr (kMeta) {
    return {a.reduction == "none" ? at::empty_symint(a.target.sym_sizes(), options) : at::empty({}, options),
            empty_gradient(a.x, needs_x), empty_gradient(a.weight, needs_weight)};
  }
  const Targets targets(a);
  const at::Tensor factors = needs_x || needs_weight ? row_factors(a, targets, at::ones({}, options)) : at::Tensor();
  auto [losses, grad_x, grad_weight] = in_chunks(a, targets, factors, needs_x, needs_weight);
  losses.masked_fill_(targets.counted.logical_not(), 0);
  if (a.reduction == "none") return {losses.view(a.target.sizes()), grad_x, grad_weight};
  const at::Tensor sum = losses.sum();
  return {a.reduction == "mean" ? sum / targets.counted.sum() : sum, grad_x, grad_weight};
}

void check_backward(const BackwardArgs& b) {
  const auto& [grad, a, saved, needs_x, needs_weight] = b;
  check_arguments(a);
  const c10::SymDimVector shape(a.reduction == "none" ? a.target.sym_sizes() : at::SymIntArrayRef());
  check_tensor(kOp, "grad", grad, shape, result_type(a.x), "x", a.x);
  for (const auto& [name, gradient] :
       {std::pair("grad_x", saved.grad_x), std::pair("grad_weight", saved.grad_weight)}) {
    check_same_dtype(kOp, name, gradient, "x", a.x);
    check_same_device(kOp, name, gradient, "x", a.x);
  }
  if (!saves_gradients(a)) return;
  if (needs_x) check_tensor(kOp, "grad_x", saved.grad_x, a.x.sym_sizes(), a.x.scalar_type(), "x", a.x);
  if (needs_weight)
    check_tensor(kOp, "grad_weight", saved.grad_weight, a.weight.sym_sizes(), a.x.scalar_type(), "x", a.x);
}

template <bool kMeta>
Gradients backward(const BackwardArgs& b) {
  check_backward(b);
  const auto& [grad, a, saved, needs_x, needs_weight] = b;
  if constexpr (kMeta) return {empty_gradient(a.x, needs_x), empty_gradient(a.weight, needs_weight)};
  if (saves_gradients(a)) {
    return {needs_x ? saved.grad_x * grad : no_tensor(a.x), needs_weight ? saved.grad_weight * grad : no_tensor(a.x)};
  }
  const Targets targets(a);
  const auto [losses, grad_x, grad_weight] =
      in_chunks(a, targets, row_factors(a, targets, grad), needs_x, needs_weight);
  return {grad_x, grad_weight};
}

// ---- Autograd and autocast ----

Forward call_forward(const ForwardArgs& f) {
  return call<"linear_cross_entropy_forward", &forward<false>>(f);
}

// A gradient of 1 on the CPU, as the loss of a training step has: what was saved is the gradient, without a copy as
// large as the weight. Elsewhere to look would wait for the device, or break a graph.
bool is_one(const at::Tensor& grad) {
  return grad.is_cpu() && grad.dim() == 0 && !at::isTensorSubclassLike(grad) && !at::GradMode::is_enabled() &&
         grad.item<double>() == 1;
}

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList inputs, const Args& a) {
    const bool needs_x = inputs[0].requires_grad(), needs_weight = inputs[1].requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [loss, grad_x, grad_weight] = call_forward({a, needs_x, needs_weight});
    save_args(ctx, a, Saved{grad_x, grad_weight});
    return loss;
  }

  static std::vector<at::Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<at::Tensor>& grads) {
    const auto [a, saved] = saved_args<Args, Saved>(ctx);
    const auto inputs = tensor_list(a.x, a.weight);
    const c10::List<bool> needs = needed_gradients(ctx, inputs);
    at::Tensor grad_x = saved.grad_x, grad_weight = saved.grad_weight;
    if (!saves_gradients(a) || !is_one(grads[0])) {
      std::tie(grad_x, grad_weight) =
          call<"linear_cross_entropy_backward", &mfx::backward<false>>({grads[0], a, saved, needs[0], needs[1]});
    }
    return gradients_of_defined(inputs, {needs[0] ? grad_x : at::Tensor(), needs[1] ? grad_weight : at::Tensor()});
  }
};

at::Tensor below_autograd(const Args& a) {
  return std::get<0>(call_forward({a, /*needs_x=*/false, /*needs_weight=*/false}));
}

at::Tensor autograd(const Args& a) {
  refuse_forward_mode(kOp, a.x, a.weight);
  if (records_grad(a.x, a.weight)) return apply<LinearCrossEntropy>(tensor_list(a.x, a.weight), a);
  const at::AutoDispatchBelowADInplaceOrView below;
  return below_autograd(a);
}

// x and weight in the autocast type, as a linear layer has them; the loss is float32 whatever that is.
at::Tensor autocast(Args a) {
  const Autocast cast(a.x);
  cast(a.x);
  cast(a.weight);
  return call<"linear_cross_entropy", &autocast>(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moduleformer_ext, m) {
  using enum c10::DispatchKey;
  const std::string args =
      "Tensor x, Tensor weight, Tensor target, int ignore_index=-100, str reduction='mean', float z_loss=0.0";
  const std::string given = "Tensor x, Tensor weight, Tensor target, int ignore_index, str reduction, float z_loss";
  Definition(m, "linear_cross_entropy(" + args + ") -> Tensor")
      .kernel<&below_autograd>({CPU, CUDA, Meta})
      .kernel<&autograd>({Autograd})
      .kernel<&autocast>({AutocastCPU, AutocastCUDA});
  // Gradients that are not needed, or that backward makes (reduction none, float16), are empty tensors.
  Definition(m, "linear_cross_entropy_forward(" + given +
                    ", bool needs_x, bool needs_weight) -> (Tensor loss, Tensor grad_x, Tensor grad_weight)")
      .kernel<&forward<false>>({CPU, CUDA})
      .kernel<&forward<true>>({Meta})
      .kernel(Autograd, not_differentiable());
  Definition(m, "linear_cross_entropy_backward(Tensor grad, " + given +
                    ", Tensor grad_x, Tensor grad_weight, bool needs_x, bool needs_weight) -> (Tensor, Tensor)")
      .kernel<&backward<false>>({CPU, CUDA})
      .kernel<&backward<true>>({Meta})
      .kernel(Autograd, not_differentiable());
}

}  // namespace mfx
