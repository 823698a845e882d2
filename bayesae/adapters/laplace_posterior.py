"""`from_laplace`: a fitted laplace-torch object as a predictive of this library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesae.adapters.flat import masks_of, unflatten
from bayesae.adapters.networks import clean_copy, cut_network
from bayesae.adapters.outputs import OutputPredictive
from bayesae.curvature import Layout, RotatedBlock
from bayesae.errors import NotFittedError, ParameterError, UnsupportedError
from bayesae.families import DenseNormal, DiagonalNormal, IndependentNormals, KroneckerNormal, LowRankNormal
from bayesae.functional import parameters_of
from bayesae.likelihoods import Gaussian
from bayesae.models import Autoencoder
from bayesae.predictive import Predictive
from bayesae.subset import Subset
from bayesae.types import Likelihood, Params

if TYPE_CHECKING:
    from laplace import ParametricLaplace

__all__ = ["from_laplace"]


def from_laplace(
    la: ParametricLaplace, *, likelihood: Likelihood | None = None, cut: int | str | None = None
) -> Predictive | OutputPredictive:
    r"""Take over a fitted laplace-torch object: its posterior, and predictions at this engine's price.

    .. math:: q(\theta) = \mathcal{N}\big(\theta_*, (H / (\sigma^2 T) + P_0)^{-1}\big)

    with the posterior's mean, its curvature H (diagonal, Kronecker, dense, low rank; of all weights, a sub-network or
    the last layer), prior precision P_0, noise scale and temperature as ``la`` has them now. Predictions are
    linearised, which is laplace-torch's ``pred_type="glm"``; they need no Jacobian of the weights, and outputs may have
    any shape. ``la`` and its network stay untouched and are not referred to afterwards.

    The mean is ``la.mean``, whatever the network's weights are by now: laplace-torch does not restore them from a saved
    posterior. Parameters outside the posterior keep the value they have in ``la.model``.

    Args:
        la: A fitted object of laplace-torch, over a network that is an autoencoder: a module whose forward is
            ``decoder(encoder(x))`` with attributes of these names, or an `nn.Sequential`.
        likelihood: p(x | outputs) of predictions; a `Gaussian` of ``la.sigma_noise`` if None.
        cut: Of an `nn.Sequential`, index or name of the module at which the decoder starts. None: after the first
            module with the fewest outputs, read off the linear layers.

    Returns:
        A `Predictive`. Of a network that is not an autoencoder, as far as can be seen without data, and of any
        classifier an `OutputPredictive`, which has output moments and no decoder, and says why.

    Exact when: always, as a copy: mean and variance equal those of ``la(x)``.
    Cost: what the posterior is made of, once: an eigendecomposition is laplace-torch's own, a dense precision of S
        weights is inverted, S^3.

    Raises:
        NotFittedError: If ``la`` was not fitted.
        UnsupportedError: For its functional approximations and reward models, or a Kronecker block of a layer that it
            cannot stand for.
        ParameterError: If parameters of the network were replaced since the fit, or ``cut`` names no place.
    """
    source = _Source.of(la)
    if la.likelihood == "classification":
        reason = "a classifier's network, which has classes for outputs"
        return OutputPredictive(source.network, source.posterior(la), likelihood, reason)
    likelihood = Gaussian(float(torch.as_tensor(la.sigma_noise).detach())) if likelihood is None else likelihood
    try:
        encoder, decoder, names = cut_network(source.network, cut)
    except UnsupportedError as error:
        if cut is not None:
            raise
        return OutputPredictive(source.network, source.posterior(la), likelihood, error.got)
    model = Autoencoder(encoder, decoder, likelihood).eval()
    return Predictive(model, source.renamed(names).posterior(la))


@dataclass(frozen=True)
class _Source:
    """What the posterior's vector means.

    Args:
        network: A copy at the posterior's mean.
        mean: Every parameter of it in its own shape.
        uncertain: Names of the parameters in the vector, in its order.
        layouts: For each weight of a linear layer or an ungrouped convolution, its matrix.
    """

    network: nn.Module
    mean: Params
    uncertain: list[str]
    layouts: dict[str, Layout]

    @classmethod
    def of(cls, la: Any) -> _Source:  # noqa: ANN401 - laplace-torch's annotations contradict one another
        import laplace

        kind = type(la)
        if not issubclass(kind, laplace.ParametricLaplace) or la.likelihood not in {"regression", "classification"}:
            raise UnsupportedError(
                "a Gaussian over weights, for regression or classification",
                f"{kind.__name__} for {getattr(la, 'likelihood', 'something else')}",
                "Use one of laplace.ParametricLaplace.",
            )
        if la.n_data == 0:
            raise NotFittedError("a fitted laplace-torch object", f"{kind.__name__} before fit", "Call la.fit first.")
        network, parameters = la.model, la.params
        if issubclass(kind, laplace.LLLaplace):
            network, parameters = la.model.model, list(la.model.last_layer.parameters())
        elif issubclass(kind, laplace.LowRankLaplace):  # it counts frozen ones in
            parameters = list(la.model.parameters())
        mean = parameters_of(network)
        names = {id(value): name for name, value in network.named_parameters()}
        uncertain = [names.get(id(value), "") for value in parameters]
        if "" in uncertain or sum(value.numel() for value in parameters) != len(la.mean):
            raise ParameterError(
                "the parameters that laplace-torch was given",
                "others in their place",
                "Fit again, or load the network.",
            )
        mean |= unflatten(la.mean.detach().clone(), {name: mean[name] for name in uncertain})
        return cls(clean_copy(network, mean), mean, uncertain, _layouts(network, mean))

    def renamed(self, names: dict[str, str]) -> _Source:
        """The same under an `Autoencoder`'s names."""
        layouts = {
            names[name]: replace(layout, weight=names[name], bias=None if layout.bias is None else names[layout.bias])
            for name, layout in self.layouts.items()
        }
        mean = {names[name]: value for name, value in self.mean.items()}
        return _Source(self.network, mean, [names[name] for name in self.uncertain], layouts)

    @property
    def vector(self) -> Params:
        """The parameters of the posterior's vector, in its order."""
        return {name: self.mean[name] for name in self.uncertain}

    def posterior(self, la: Any) -> Any:  # noqa: ANN401 - one of five families
        """The family that holds ``la``'s precision."""
        import laplace

        kind = type(la)
        if issubclass(kind, laplace.KronLaplace):
            # la.posterior_precision, whose scalar must not be a leaf of a graph (it goes through math.pow)
            return self._kronecker(la.H.detach() * float(la._H_factor.detach()) + la.prior_precision.detach())
        if issubclass(kind, laplace.LowRankLaplace):
            return self._low_rank(*la.posterior_precision)
        precision = la.posterior_precision.detach()
        is_part = issubclass(kind, laplace.SubnetLaplace)
        indices = la.backend.subnetwork_indices if is_part else torch.arange(len(la.mean))
        masks, rank = masks_of(indices, self.vector)
        order, subset = rank.argsort().to(precision.device), Subset(masks)
        if issubclass(kind, laplace.DiagLaplace):
            return DiagonalNormal(self.mean, 1 / precision[order], subset, is_linearised=True)
        return DenseNormal(self.mean, precision[order][:, order], subset, is_linearised=True)

    def _kronecker(self, precision: Any) -> Any:  # noqa: ANN401 - its annotations are of other shapes
        """A matrix Normal for every layer, and dense blocks for vectors that do not fit in."""
        # A weight's two factors and its bias's one are apart in laplace-torch. They fit in one basis where the bias's
        # factor is the weight's output factor, as its backends have it for linear layers.
        stacked = zip(precision.eigenvectors, precision.eigenvalues, precision.deltas, strict=True)
        factors = dict(zip(self.uncertain, stacked, strict=True))
        alone = {name: (q[0], values[0] + delta) for name, (q, values, delta) in factors.items() if len(q) == 1}
        blocks = []
        for name in [name for name in factors if name not in alone]:
            if name not in self.layouts:
                raise UnsupportedError(
                    "Kronecker factors of linear layers and ungrouped convolutions",
                    f"those of {name!r}",
                    "Use hessian_structure='diag' or 'full'.",
                )
            (outputs, inputs), values, delta = factors[name]
            layout, variances = self.layouts[name], 1 / (torch.outer(values[0], values[1]) + delta)
            if layout.bias is not None:
                column = variances.new_zeros(len(outputs))
                if layout.bias in alone:
                    rotated = _rotated(outputs, *alone[layout.bias])
                    if rotated is not None:
                        column = rotated
                        del alone[layout.bias]
                inputs = torch.block_diag(inputs, inputs.new_ones(1, 1))
                variances = torch.cat([variances, column[:, None]], 1)
            blocks.append(RotatedBlock(layout, outputs[None], inputs[None], variances[None]))
        parts: list[Any] = []
        if blocks:
            parts.append(KroneckerNormal(self.mean, tuple(blocks), {}, is_linearised=True))
        if alone:
            masks = {name: torch.ones(self.mean[name].shape, dtype=torch.bool) for name in alone}
            matrix = torch.block_diag(*((basis * precisions) @ basis.T for basis, precisions in alone.values()))
            parts.append(DenseNormal(self.mean, matrix, Subset(masks), is_linearised=True))
        return parts[0] if len(parts) == 1 else IndependentNormals(parts)

    def _low_rank(self, curvature: tuple[Tensor, Tensor], prior: Tensor) -> LowRankNormal:
        vectors, values = (part.detach() for part in curvature)
        if bool((values < 0).any()):
            raise UnsupportedError(
                "a curvature without negative eigenvalues", f"one of {float(values.min()):.3g}", "Use a GGN backend."
            )
        subset = Subset({name: torch.ones(self.mean[name].shape, dtype=torch.bool) for name in self.uncertain})
        return LowRankNormal(self.mean, prior.detach(), (vectors * values.sqrt()).T, subset, is_linearised=True)


def _rotated(outputs: Tensor, basis: Tensor, precisions: Tensor) -> Tensor | None:
    """Variances of a bias in a weight's output basis (C, C), or None if the bias is not independent there."""
    turned = outputs.T @ basis
    covariance = (turned / precisions) @ turned.T
    variances = covariance.diagonal()
    rest = covariance - torch.diag(variances)
    is_rounding = rest.abs().max() <= 100 * torch.finfo(rest.dtype).eps * variances.max()
    return variances if bool(is_rounding) else None


def _layouts(network: nn.Module, params: Params) -> dict[str, Layout]:
    found = {}
    for name, module in network.named_modules():
        weight, bias = (f"{name}.{part}".removeprefix(".") for part in ("weight", "bias"))
        is_conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1
        if (isinstance(module, nn.Linear) or is_conv) and weight in params:
            found[weight] = Layout(weight, bias if bias in params else None, params[weight].shape)
    return found
