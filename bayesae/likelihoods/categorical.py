"""The categorical likelihood: classes, or a list of values such as grey levels; the network gives logits."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from bayesae.errors import DataError
from bayesae.likelihoods.base import Head, float64_of
from bayesae.types import BlockHessian

__all__ = ["Categorical"]

_TOLERANCE = 1e-2  # of the smallest gap between values: float32 data are off by far less


class Categorical(Head):
    r"""Independent numbers of C classes each; the network gives logits (..., B, \*D, C).

    .. math:: \log p(x \mid f) = \sum_d f_{d, x_d} - \log \sum_c e^{f_{d, c}}, \qquad
              H_d = \operatorname{diag}(p_d) - p_d p_d^\top

    Data are class numbers 0 ... C - 1 (floats that hold them are fine), or, where ``values`` are given, those values.
    Without values classes have no order, and the mean in data space is the vector of probabilities (..., B, \*D, C);
    with values it is their expectation (..., B, \*D).

    Args:
        n_classes: C, at least 2.
        values: C increasing numbers that the classes stand for, in the units of the data: ``[k / 255 for k in
            range(256)]`` for bytes on the unit interval. None for classes without an order.

    Exact when: classes are what the data are; nothing is assumed about their order.
    Biased when: `log_predictive` of values is the Normal of the predictive moments rounded to the nearest value, whose
        own variance is wider by about a twelfth of the squared gap.
    Cost: C logits a number, and blocks of B D C^2 numbers for a curvature: 256 grey levels of 64 numbers in a batch of
        128 rows are 537 million. Use fewer levels, smaller batches, or a `Gaussian` there.

    No closed form under Normal logits: `normal_moments` is None, and predictive moments come from draws.

    Raises:
        DataError: If a number is none of the classes or values (see `check`), or the arguments make no such list.

    References:
        | Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016): grey levels as classes
    """

    def __init__(self, n_classes: int, values: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        try:
            n_classes = operator.index(n_classes)
        except TypeError as error:
            raise DataError("a whole number of n_classes", repr(n_classes), "Give an int.") from error
        if n_classes < 2:
            raise DataError("n_classes of at least 2", repr(n_classes), "One class has nothing to learn.")
        self.n_parameters = n_classes
        self.values: tuple[float, ...] | None = None
        if values is not None:
            given = float64_of("increasing values", values)
            if given.shape != (n_classes,) or not bool((given.diff() > 0).all() & given.isfinite().all()):
                raise DataError(
                    f"{n_classes} increasing values", f"values of shape {tuple(given.shape)}", "One for every class."
                )
            self.values = tuple(given.tolist())
            self._tolerance = _TOLERANCE * float(given.diff().min())

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"n_classes": self.n_parameters, "values": None if self.values is None else list(self.values)}

    def check(self, target: Tensor) -> None:
        r"""Raise unless all of ``target`` are classes, or values up to a hundredth of their smallest gap.

        0 always passes, because entries that nobody observed hold it here; one that does count and is no value has a
        log-density of minus infinity.

        Args:
            target: (B, \*D).

        Raises:
            DataError: Giving the first number that is none.
        """
        is_bad = ~(self._classes(target)[1] | (target == 0))
        if bool(is_bad.any()):
            n = self.n_parameters
            what = f"class numbers 0 ... {n - 1}" if self.values is None else f"one of {n} values"
            raise DataError(
                f"{what} for Categorical",
                f"{float(target[is_bad][0]):.6g}",
                "Number the classes from 0, give values=, or round the data to them.",
            )

    @property
    def is_nominal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the classes came without values."""
        return self.values is None

    def _classes(self, target: Tensor) -> tuple[Tensor, Tensor]:
        r"""Class of every number (B, \*D), and whether it is one."""
        known = target.nan_to_num()  # NaN, which stands for what nobody observed, must index something
        if self.values is None:
            classes = known.round().clamp(0, self.n_parameters - 1)
            return classes.long(), classes == target
        values = torch.tensor(self.values, dtype=target.dtype, device=target.device)
        classes = torch.bucketize(known.contiguous(), 0.5 * (values[1:] + values[:-1]))
        return classes, (values[classes] - target).abs() <= self._tolerance

    def log_density(self, outputs: Tensor, target: Tensor) -> Tensor:
        r"""Log-probability of every number, nats, (..., B, \*D)."""
        classes, is_one = self._classes(target)
        log_p = outputs.log_softmax(-1)
        chosen = log_p.gather(-1, classes.expand(log_p.shape[:-1])[..., None])[..., 0]
        return torch.where(is_one, chosen, -torch.inf)

    def attainable(self, target: Tensor) -> Tensor:
        r"""0 of every class, (B, \*D): the probability goes to 1 with its logit."""
        return torch.where(self._classes(target)[1], torch.zeros_like(target), -torch.inf)

    def distribution(self, outputs: Tensor) -> torch.distributions.Categorical:
        """Categorical over class numbers, or over the values."""
        if self.values is None:
            return torch.distributions.Categorical(logits=outputs, validate_args=False)
        return _Valued(self, outputs)

    def mean(self, outputs: Tensor) -> Tensor:
        r"""Probabilities (..., B, \*D, C); with values their expectation (..., B, \*D)."""
        p = outputs.softmax(-1)
        return p if self.values is None else p @ p.new_tensor(self.values)

    def variance(self, outputs: Tensor) -> Tensor:
        """P (1 - p) of every class's indicator; with values their variance."""
        p = outputs.softmax(-1)
        if self.values is None:
            return p * (1 - p)
        values = p.new_tensor(self.values)
        return (p * (values - (p @ values)[..., None]) ** 2).sum(-1)

    def output_hessian(self, outputs: Tensor) -> BlockHessian:
        r"""Blocks diag(p) - p p^T of the logits of a number, (B, \*D, C, C)."""
        p = outputs.softmax(-1)
        products = p[..., :, None] * p[..., None, :]
        others = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
        # p (1 - p) as the sum of the others: of a class that is nearly sure the difference would lose its digits, and
        # the block its sign
        return BlockHessian(torch.diag_embed(others.sum(-1)) - others, axis=outputs.dim() - 1)

    def normal_moments(self, mean: Tensor, var: Tensor) -> None:
        """None: a softmax of Normal logits has no closed form, and needs their covariances."""

    def log_predictive(self, mean: Tensor, var: Tensor, target: Tensor) -> Tensor:
        r"""Log-probability of every number (B, \*D): of these probabilities, or of a rounded Normal for values."""
        classes, is_one = self._classes(target)
        if self.values is None:
            p = mean.gather(-1, classes[..., None])[..., 0]
            return torch.where(is_one, p.clamp(min=torch.finfo(mean.dtype).tiny).log(), -torch.inf)
        values = mean.new_tensor(self.values)
        inner = 0.5 * (values[1:] + values[:-1])
        edges = torch.cat([inner.new_tensor([-torch.inf]), inner, inner.new_tensor([torch.inf])])
        # a Normal that is narrow beside the gaps puts everything on one value, to rounding
        scale = var.sqrt().clamp(min=1e-3 * float(self._tolerance))
        return torch.where(
            is_one, _log_between((edges[classes] - mean) / scale, (edges[classes + 1] - mean) / scale), -torch.inf
        )

    def extra_repr(self) -> str:
        """Number of classes, for ``repr``."""
        span = "" if self.values is None else f", values={self.values[0]:.4g} ... {self.values[-1]:.4g}"
        return f"n_classes={self.n_parameters}{span}"


def _log_between(low: Tensor, high: Tensor) -> Tensor:
    """Log of a standard Normal's mass between two numbers, in its tails too."""
    is_right = low > 0  # there the mirror image keeps digits
    low, high = torch.where(is_right, -high, low), torch.where(is_right, -low, high)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-torch.finfo(low.dtype).tiny)))


class _Valued(torch.distributions.Categorical):
    """A categorical law whose draws and arguments are the values themselves."""

    def __init__(self, head: Categorical, logits: Tensor) -> None:
        self.head = head
        super().__init__(logits=logits, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real

    @property
    def mean(self) -> Tensor:
        return self.head.mean(self.logits)

    @property
    def variance(self) -> Tensor:
        return self.head.variance(self.logits)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.logits.new_tensor(self.head.values)[super().sample(torch.Size(sample_shape))]

    def log_prob(self, value: Tensor) -> Tensor:
        return self.head.log_density(self.logits, value)
