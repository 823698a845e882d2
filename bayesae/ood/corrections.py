"""What a likelihood is compared with: itself at the best code, another model, the image's own complexity."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from bayesae.data import as_tensor
from bayesae.draws import Draws, fitted_mask, mean_over_weights
from bayesae.errors import DataError, ShapeError
from bayesae.functional import check_finite
from bayesae.ood.densities import negative_log_predictive
from bayesae.types import Likelihood

__all__ = ["attainable", "input_complexity", "likelihood_ratio", "likelihood_regret"]


def attainable(likelihood: Likelihood, x: Tensor | np.ndarray, mask: Tensor | np.ndarray | None = None) -> Tensor:
    r"""The largest log-likelihood that any outputs give the row, :math:`\sum_o \max_f \log p(x_o \mid f)`.

    Of a Bernoulli likelihood of grey levels it depends on x (0 for black and white, -log 2 a grey pixel), so that
    dark images of few greys look familiar whatever the model. ``score + attainable(likelihood, x)`` takes that out of
    any score in nats: what is left is half the deviance, of a model against the saturated one.

    Args:
        likelihood: The head.
        x: (B, \*data).
        mask: True where x was observed, (B, \*data); other entries, which may be NaN, count 0.

    Returns:
        (B,), nats; one number for all rows where only the noise matters (Gaussian).

    Raises:
        ShapeError: If the mask is not bool or does not fit x.
        NonFiniteError: If an observed entry is NaN or infinite.
        DataError: If x lies outside the likelihood's range.
        UnsupportedError: If densities have no largest value: scales that are outputs, a continuous Bernoulli's edges.

    Exact when: always.

    References:
        | Bayesian autoencoders: Analysing and fixing the Bernoulli likelihood for out-of-distribution detection
          (Yong, Pearce, Brintrup, 2021)
    """
    rows, is_seen = as_tensor(x), None
    if mask is not None:
        is_seen = fitted_mask(as_tensor(mask), rows.shape).to(rows.device)
        rows = torch.where(is_seen, rows, 0.0)
    check_finite({"x": rows}, "entries", "Give a mask, True where x was observed.")
    likelihood.check(rows.detach())
    values = likelihood.attainable(rows)
    if is_seen is not None:
        values = torch.where(is_seen.reshape(values.shape), values, 0.0)
    return values.reshape(len(values), -1).sum(1)


def likelihood_regret(start: Draws, refined: Draws) -> Tensor:
    r"""What the row's evidence lower bound gains when its code posterior is fitted to it alone.

    .. math:: \max_q \mathcal{L}(x, q) - \mathcal{L}(x, q_{\text{encoder}})

    The encoder has learnt to do well by familiar rows; of strange ones it loses more.

    Args:
        start: Draws of the predictive under the encoder's posterior (``codes.amortised``).
        refined: Draws of the same rows, weights and seed under ``codes.Refined()`` or ``codes.Laplace()``.

    Returns:
        (B,), nats, the mean over weight draws.

    Raises:
        ShapeError: If they are not of the same rows and weight draws.
        UnsupportedError: If a code posterior has no density.

    Exact when: the refined posterior is the best of its family, with the KL in closed form and many code draws.
    Biased when: codes are few: by the Monte-Carlo error of either bound, most of which common noise takes out.

    References:
        | Likelihood Regret: An Out-of-Distribution Detection Score For Variational Auto-encoder (Xiao, Yan, Amit,
          2020); there the encoder's weights climb for each row, here its q alone.
    """
    _check_same(start, refined)
    return mean_over_weights(_bound(refined) - _bound(start))


def likelihood_ratio(draws: Draws, background: Draws) -> Tensor:
    r"""Minus the log-ratio of the row's density to that of a background model.

    .. math:: \log \frac1S \sum_s p_{\text{background}}(x \mid \theta_s) - \log \frac1S \sum_s p(x \mid \theta_s)

    A model of perturbed images (a tenth to a third of the pixels replaced at random) knows the background's statistics
    and no shapes; what both explain cancels.

    Args:
        draws: Draws of the predictive at x.
        background: Draws of the background model's at the same rows.

    Returns:
        (B,), nats.

    Raises:
        ShapeError: If rows differ in number.

    Exact when: as a ratio, if both densities are.
    Biased when: the share of perturbed pixels is chosen by strange data; a different share gives another score.

    References:
        | Likelihood Ratios for Out-of-Distribution Detection (Ren, Liu, Fertig, Snoek, Poplin, DePristo, Dillon,
          Lakshminarayanan, 2019)
    """
    if draws.log_likelihood.shape[-1] != background.log_likelihood.shape[-1]:
        got = f"{draws.log_likelihood.shape[-1]} and {background.log_likelihood.shape[-1]} rows"
        raise ShapeError("draws of the same rows", got, "Run both predictives on one x.")
    return negative_log_predictive(draws) - negative_log_predictive(background)


def input_complexity(
    x: Tensor | np.ndarray, *, n_levels: int = 256, value_range: tuple[float, float] | None = None
) -> Tensor:
    r"""Length of a lossless code of each row, :math:`\log 2 \cdot 8\, |\text{bytes}|`.

    ``negative_log_predictive(draws) - input_complexity(x)`` is the published score: minus the log-ratio of the model's
    density to that of a universal code, which knows no data set.

    Args:
        x: (B, \*data), quantised to ``n_levels`` levels.
        n_levels: Levels of grey.
        value_range: Values of the lowest and the highest level, (0, 1) for images as `datasets.load` gives them. None
            takes the smallest and largest of all rows together: a row's length then depends on those it comes with.

    Returns:
        (B,), nats, float64 on the CPU: the shorter of two DEFLATE codes, of the levels and of their differences along
        the last axis. A few dozen bytes of overhead are the same for all rows.

    Raises:
        DataError: If there are no rows, entries are not finite or out of the range, or levels do not fit a byte.

    No exact case: any code is an upper bound of the complexity.
    Cost: a compression a row, on the CPU.

    References:
        | Input complexity and out-of-distribution detection with likelihood-based generative models (Serra, Alvarez,
          Gomez, Slizovskaia, Nunez, Luque, 2020); PNG, JPEG2000 and FLIF there.
    """
    rows = as_tensor(x).detach().cpu().double()
    if rows.numel() == 0 or not bool(rows.isfinite().all()) or not 2 <= n_levels <= 256:
        got = f"shape {tuple(rows.shape)}, n_levels={n_levels}"
        raise DataError("finite rows and 2 to 256 levels", got, "Fill in what is missing, or leave those rows out.")
    smallest, largest = float(rows.min()), float(rows.max())
    low, high = (smallest, largest) if value_range is None else value_range
    if not low <= smallest <= largest <= high:
        got = f"values from {smallest:.4g} to {largest:.4g}"
        raise DataError(f"rows within the value_range {(low, high)}", got, "Give the range of the data, low first.")
    levels = ((rows - low) / (high - low if high > low else 1.0) * (n_levels - 1)).round().numpy().astype(np.uint8)
    steps = np.diff(levels, axis=-1, prepend=np.uint8(0))  # modulo 256, so that nothing is lost
    lengths = [min(len(zlib.compress(a.tobytes(), 9)) for a in pair) for pair in zip(levels, steps, strict=True)]
    return torch.tensor(lengths, dtype=torch.float64) * 8 * math.log(2)


def _bound(draws: Draws) -> Tensor:
    """Evidence lower bound, (S, B)."""
    if draws.kl is None:
        return draws.log_ratio.mean(0)
    return draws.log_likelihood.mean(0) - draws.kl.sum(-1)


def _check_same(first: Draws, second: Draws) -> None:
    shapes = [tuple(draws.log_likelihood.shape[1:]) for draws in (first, second)]
    if shapes[0] != shapes[1]:
        raise ShapeError("draws of the same weights and rows", f"(S, B) of {shapes}", "Call both with one seed.")
