"""`LogJoint`: log p(D, theta), one batch at a time, with N, the mean-or-sum and the temperature settled once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesae.distributed import add_over_ranks, n_ranks, own_rows
from bayesae.draws import Draws
from bayesae.errors import DataError, ParameterError, ShapeError, UnsupportedError
from bayesae.functional import at_least_float32, parameters_of
from bayesae.subset import Subset
from bayesae.types import Batch, Likelihood, Params, WeightPrior

__all__ = ["IndependentNormal", "IsotropicNormal", "LogJoint", "ScaleMixture"]


@dataclass(frozen=True)
class IsotropicNormal:
    r"""p(theta) = N(0, I / precision) over every weight and bias.

    Args:
        precision: In 1 / (units of theta) squared; a weight decay of precision / N on the mean loss.

    Raises:
        DataError: If the precision is not positive and finite.
    """

    precision: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.precision < math.inf:
            raise DataError("a positive, finite prior precision", repr(self.precision), "1.0 is the default.")

    def log_prob(self, params: Params) -> Tensor:
        """Log-density in nats, (S,)."""
        squares = torch.stack([(at_least_float32(leaf) ** 2).flatten(1).sum(1) for leaf in params.values()]).sum(0)
        n = sum(leaf[0].numel() for leaf in params.values())
        return 0.5 * (n * math.log(self.precision / (2 * math.pi)) - self.precision * squares)

    def precisions_of(self, params: Params) -> Params:
        r"""Precision of every weight: float64, in the shapes (\*shape) of ``params``, expanded and not copied."""
        return {name: _spread(self.precision, leaf) for name, leaf in params.items()}


@dataclass(frozen=True)
class IndependentNormal:
    r"""Independent Normals around 0, with a precision for every parameter tensor or for every weight.

    .. math:: p(\theta) = \prod_i \mathcal{N}(\theta_i \mid 0, 1 / \lambda_i)

    Args:
        precisions: By parameter name, for every parameter: a number for the whole tensor, or a tensor (\*shape) of the
            parameter's own shape; in 1 / (units of theta) squared. Laplace leaves one, tuned by layer or by weight.

    Exact when: no exact case, it is a choice; equal numbers throughout make it an `IsotropicNormal`.
    Cost: as many operations as weights.

    Raises:
        DataError: If a precision is not positive and finite.
        ParameterError: When used, if parameters have no precision, or precisions no parameter.
        ShapeError: When used, if a tensor of precisions does not have its parameter's shape.
    """

    precisions: Mapping[str, float | Tensor]

    def __post_init__(self) -> None:
        for name, value in self.precisions.items():
            values = torch.as_tensor(value)
            if not bool(((values > 0) & (values < math.inf)).all()):
                got = f"{float(values.min()):.3g} to {float(values.max()):.3g} for {name!r}"
                raise DataError("positive, finite prior precisions", got, "1.0 is a plain start.")

    def log_prob(self, params: Params) -> Tensor:
        """Log-density in nats, (S,)."""
        self._check(params.keys())
        total = []
        for name, leaf in params.items():
            values, precision = at_least_float32(leaf), self.precisions[name]
            if isinstance(precision, Tensor):
                precision = _spread(precision, leaf[0], name).to(values)
                log_norm = torch.log(precision / (2 * math.pi)).sum()
            else:
                log_norm = leaf[0].numel() * math.log(precision / (2 * math.pi))
            total.append(0.5 * (log_norm - (precision * values**2).flatten(1).sum(1)))
        return torch.stack(total).sum(0)

    def precisions_of(self, params: Params) -> Params:
        r"""Precision of every weight: float64, in the shapes (\*shape) of ``params``."""
        self._check(params.keys())
        return {name: _spread(self.precisions[name], leaf, name) for name, leaf in params.items()}

    def _check(self, names: Collection[str]) -> None:
        missing, unknown = [n for n in names if n not in self.precisions], sorted(self.precisions.keys() - set(names))
        if missing or unknown:
            got = f"none for {missing} and some for unknown {unknown}"
            raise ParameterError("a precision for every parameter", got, "Name them as in model.network.")


def _spread(precision: float | Tensor, leaf: Tensor, name: str = "") -> Tensor:
    """A precision in the shape of its parameter."""
    if isinstance(precision, Tensor):
        if precision.shape != leaf.shape:
            expected = f"precisions of shape {tuple(leaf.shape)} for {name!r}"
            raise ShapeError(expected, f"{tuple(precision.shape)}", "Give a number for the whole tensor.")
        return precision.to(leaf.device, torch.float64)
    return torch.tensor(precision, dtype=torch.float64, device=leaf.device).expand(leaf.shape)


@dataclass(frozen=True)
class ScaleMixture:
    r"""Independent mixtures of a wide and a narrow Normal: most weights near 0, some free.

    .. math:: p(\theta) = \prod_i \big[ \pi\, \mathcal{N}(\theta_i \mid 0, s_1^2)
              + (1 - \pi)\, \mathcal{N}(\theta_i \mid 0, s_2^2) \big]

    Args:
        share: pi, share of the first, in (0, 1).
        scales: Standard deviations s_1 and s_2, in units of theta.

    Exact when: no exact case, it is a choice; two equal scales make it an `IsotropicNormal`.
    Cost: as many operations as weights; no closed form with a Normal, so that methods which want one refuse it.

    Raises:
        DataError: If the share or a scale is out of its range, or there are not two scales.

    References:
        | Weight Uncertainty in Neural Networks (Blundell et al., 2015): the defaults are among
          what was searched there
    """

    share: float = 0.5
    scales: tuple[float, float] = (1.0, math.exp(-6.0))

    def __post_init__(self) -> None:
        is_sound = len(self.scales) == 2 and all(0 < scale < math.inf for scale in self.scales)
        if not (0 < self.share < 1 and is_sound):
            got = f"{self.share} and {tuple(self.scales)}"
            raise DataError("a share in (0, 1) and two positive, finite scales", got, "Try 0.5 and (1.0, 0.0025).")

    def log_prob(self, params: Params) -> Tensor:
        """Log-density in nats, (S,)."""
        total = []
        for leaf in params.values():
            values = at_least_float32(leaf).flatten(1)
            parts = [
                math.log(share / scale) - 0.5 * math.log(2 * math.pi) - 0.5 * (values / scale) ** 2
                for share, scale in zip((self.share, 1 - self.share), self.scales, strict=True)
            ]
            total.append(torch.logaddexp(*parts).sum(1))
        return torch.stack(total).sum(0)


def _x_of(batch: Batch) -> Tensor:
    return batch.x


@dataclass(frozen=True)
class LogJoint:
    r"""log p(D, theta) as every weight method sees it.

    .. math:: \log p(D, \theta) = \sum_{i=1}^{N} \log p(x_i \mid \theta) + \log p(\theta)

    Args:
        network: The module tree x -> outputs with its parameter names: what curvature needs.
        likelihood: Head on the outputs.
        per_example: Log-density of each row: draws with leaves (S, \*shape) and a batch to (S, B).
        prior: p(theta).
        n_data: N, rows in the whole data set.
        temperature: T; the joint's estimate is divided by it. 1 is Bayes; below 1 is a colder posterior.
        is_deterministic: Whether ``per_example`` gives the same value twice; Metropolis steps and evidence need it.
        inputs: What ``network`` takes for a batch; its x by default.
        draws: The draws of codes that ``per_example`` reduces, with outputs, where a code is stochastic and somebody
            wants more of them than their densities.
        n_pass: Rows that one pass over the data reads, where these are not N: methods that go by passes count them.

    Raises:
        DataError: If the temperature is not positive, or there is no row.
    """

    network: nn.Module
    likelihood: Likelihood
    per_example: Callable[[Params, Batch], Tensor]
    prior: WeightPrior
    n_data: int
    temperature: float = 1.0
    is_deterministic: bool = True
    inputs: Callable[[Batch], Tensor] = _x_of
    draws: Callable[[Params, Batch], Draws] | None = None
    n_pass: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf or self.n_data < 1:
            raise DataError(
                "a positive temperature and n_data >= 1", f"{self.temperature} and {self.n_data}", "1 is Bayes."
            )

    @property
    def rows_of_pass(self) -> int:
        """Rows that one pass reads; N unless ``n_pass`` says otherwise."""
        return self.n_data if self.n_pass is None else self.n_pass

    def estimate(self, params: Params, batch: Batch) -> Tensor:
        r"""Unbiased estimate of log p(D, theta) / T from one batch, (S,), in nats.

        Args:
            params: Draws, leaves (S, \*shape).
            batch: B rows drawn at random.

        Returns:
            (N / B * sum of the rows' log-densities + log prior) / T.
        """
        rows = self.per_example(params, batch)
        return (rows.sum(-1) * (self.n_data / len(batch.x)) + self.prior.log_prob(params)) / self.temperature

    def gradient(
        self, theta: Tensor, subset: Subset, base: Params, batch: Batch, *, divides_rows: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""`estimate` and its gradient in the chosen weights, of S draws at once.

        Args:
            theta: The chosen weights, (S, P), in the order of ``subset.ravel``.
            subset: Which weights these are.
            base: Every parameter in its own shape: what the others are.
            batch: B rows drawn at random, the same on every rank.
            divides_rows: Whether ranks take a share of the rows each and add up; else each has all rows, because
                it has draws of its own.

        Returns:
            Estimates (S,), nats, and gradients (S, P) in the dtype of ``theta``; neither is checked for being finite.

        Exact when: always; several ranks differ from one by rounding.
        Cost: a forward and a backward pass of S networks.
        """
        params = subset.scatter(theta.detach(), base)
        leaves = [params[name].requires_grad_() for name in subset.masks]
        part = own_rows(batch) if divides_rows else batch
        share = 1 / n_ranks() if divides_rows else 1.0
        with torch.enable_grad():
            value = self.per_example(params, part).sum(-1) * (self.n_data / len(batch.x))
            # of an isotropic prior the gradient is known, and what autograd would keep of it is as much as the weights
            is_known = isinstance(self.prior, IsotropicNormal)
            total = value if is_known else value + self.prior.log_prob(params) * share
            gradients = torch.autograd.grad(total.sum(), leaves, materialize_grads=True)
        with torch.no_grad():
            chosen = subset.ravel(dict(zip(subset.masks, gradients, strict=True)))
            if isinstance(self.prior, IsotropicNormal):
                total = value + self.prior.log_prob(params) * share
                chosen.add_(theta, alpha=-self.prior.precision * share)
            values = total.detach() / self.temperature
            chosen = chosen if self.temperature == 1 else chosen.div_(self.temperature)
        if divides_rows:
            values, chosen = add_over_ranks([values, chosen])
        return values, chosen

    def copy(self) -> LogJoint:
        """A joint over networks, likelihood and prior of its own: for methods that move the likelihood's noise."""
        return copy.deepcopy(self)

    def initialise(self) -> Params:
        """Fresh weights from the layers' own initialisation and the global generator.

        Returns:
            Every parameter in its own shape; the network itself is not touched.

        Raises:
            UnsupportedError: If a layer with parameters of its own does not know how to reset them, or has running
                statistics, which a draw of parameters does not hold.
        """
        network = copy.deepcopy(self.network)
        for name, layer in network.named_modules():
            if getattr(layer, "running_mean", None) is not None:
                raise UnsupportedError(
                    "layers whose state is all in their parameters",
                    f"{type(layer).__name__} {name!r} with running statistics of another training",
                    "Use layer or group normalisation.",
                )
            if next(layer.parameters(recurse=False), None) is None:
                continue
            if not callable(reset := getattr(layer, "reset_parameters", None)):
                raise UnsupportedError(
                    "layers with reset_parameters()",
                    f"{type(layer).__name__} {name!r} without",
                    "Define reset_parameters on it, or train the members yourself and use families.Particles.",
                )
            reset()
        return parameters_of(network)
