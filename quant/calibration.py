"""int4's calibration: the weight of a layer that makes up for the errors of all layers quantised before it."""
import torch
from torch import Tensor


def corrected_weight(w: Tensor, inputs: list[tuple[Tensor, Tensor]], hidden: list[tuple[Tensor, Tensor]] | None,
                     correction: float, damp: float) -> tuple[Tensor, Tensor]:
    """The weight [N, K] fp32 that a linear should have before rounding, where w [N, K] fp32 is its original weight; and
    the Hessian of its inputs, the mean of a.T @ a, [K, K] fp32.

    A text goes through the layers twice: through those quantised so far and through the original ones. `inputs` are
    the pairs (a, b) that reach this linear in the two copies, [texts, T, K] each. If the linear adds its output to the
    hidden states, `hidden` are their pairs (x, y), [texts, T, N]; otherwise None, and x = y = 0 below.

    The best new weight v maps the quantised inputs to the original outputs, x + a v.T = y + b w.T. By least squares,

        a.T a (v - w).T = a.T ((b - a) w.T + y - x)

    `correction` is the part of v - w that is added to w; all of it overfits the text. `damp` times the mean of the
    Hessian's diagonal is added to the diagonal, so that it can be solved.
    """
    hessian = w.new_zeros(w.shape[1], w.shape[1])
    right_side = w.new_zeros(w.shape[1], w.shape[0])
    num_tokens = 0
    for i, (a, b) in enumerate(inputs):
        a = a.float().flatten(0, 1)
        b = b.float().flatten(0, 1)
        missing = (b - a) @ w.T
        if hidden is not None:
            x, y = hidden[i]
            missing = missing + (y - x).float().flatten(0, 1)
        hessian.addmm_(a.T, a)
        right_side.addmm_(a.T, missing)
        num_tokens += len(a)
    hessian /= num_tokens
    right_side /= num_tokens
    damped = hessian.clone()
    damped.diagonal().add_(damp * hessian.diagonal().mean() + 1e-30)
    return w + correction * torch.cholesky_solve(right_side, torch.linalg.cholesky(damped)).T, hessian
