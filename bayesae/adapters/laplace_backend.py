"""The curvature engine as a backend of laplace-torch; importing this module imports laplace-torch."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from laplace.curvature import GGNInterface
from laplace.utils import Kron, Likelihood
from torch import Tensor, nn

from bayesae.adapters.flat import masks_of
from bayesae.curvature import (
    BlockHessian,
    KroneckerCurvature,
    Linearisation,
    ggn_block,
    ggn_diagonal,
    kronecker_factors,
    monte_carlo_diagonal,
)
from bayesae.errors import UnsupportedError
from bayesae.functional import parameters_of
from bayesae.types import Params

__all__ = ["BayesaeGGN"]

_ROWS_AT_ONCE, _OUTPUTS_AT_ONCE = 16, 64  # in one call of `jacobians`


class BayesaeGGN(GGNInterface):
    r"""Generalised Gauss-Newton curvature for laplace-torch, by this library's engine.

    An existing script needs one argument::

        from bayesae.adapters.laplace_backend import BayesaeGGN
        la = laplace.Laplace(network, "regression", "all", "diag", backend=BayesaeGGN)

    Of a batch it gives, over the trainable parameters in the order of ``model.parameters()``,

    .. math:: H = \sum_b J_b^\top \Lambda_b J_b, \qquad \Lambda = I \text{ (regression)}, \quad
              \Lambda = \operatorname{diag}(p) - p p^\top \text{ (classification)}

    as the diagonal, as laplace-torch's Kronecker factors or as a dense matrix, and half the squared error or the
    cross-entropy, summed over rows. laplace-torch itself divides by the noise variance. Outputs may have any shape; of
    classification the last axis counts the classes.

    Kronecker factors follow laplace-torch: a weight (out, in, \*taps) has the pair [sum of s s^T, mean of a a^T], a
    bias the single block [sum of s s^T], any other vector (of a normalisation layer) its exact dense block. The
    second of a pair is scaled by the batch's share of the N rows: after the sum over batches the product then has the
    scale of the sum over rows.

    Args:
        model: The network; hooks on it, laplace-torch's and BackPACK's own among them, are the engine's to refuse.
        likelihood: ``"regression"`` or ``"classification"``.
        last_layer: Must be False: see the errors.
        subnetwork_indices: Positions in the vector of trainable parameters, in any order; `SubnetLaplace` sets them.
        dict_key_x: Not read: inputs must be tensors.
        dict_key_y: Not read.
        stochastic: Diagonal by Monte-Carlo probes from torch's global generator, unbiased, at the price of
            ``num_samples`` backward passes.
        num_samples: Probes a row.
        chunk_size: Rows at a time, here as in the engine; None lets the engine choose.

    Exact when: always, but for ``stochastic`` and for the Kronecker structure.
    Cost: of `bayesae.curvature` for ``diag``, ``kron`` and ``full``. ``jacobians``, with which laplace-torch predicts,
        holds (B, outputs, parameters): use `bayesae.from_laplace` there.

    Raises:
        UnsupportedError: For last-layer Laplace, whose Jacobian is closed-form in laplace-torch already; for inputs
            that are no tensors; for a ``stochastic`` structure other than the diagonal; for Kronecker factors of
            transposed or grouped convolutions, which laplace-torch's `Kron` cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        chunk_size: int | None = None,
    ) -> None:
        if last_layer:
            raise UnsupportedError(
                "Laplace over all weights or a sub-network",
                "a last-layer one, whose Jacobian laplace-torch has in closed form",
                "Leave its backend at laplace-torch's default, or choose the layer by SubnetLaplace.",
            )
        super().__init__(
            model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, stochastic, num_samples
        )
        self.chunk_size = chunk_size
        self._cached: Linearisation | None = None
        self._state: Params = {}

    @torch.no_grad()
    def diag(
        self,
        x: Tensor | MutableMapping[str, Any],
        y: Tensor,
        **kwargs: Any,  # noqa: ANN401 - the interface's
    ) -> tuple[Tensor, Tensor]:
        r"""Loss and diagonal of the curvature.

        Args:
            x: Inputs (B, \*data).
            y: Targets (B, \*O), or classes (B, ...).
            **kwargs: What laplace-torch passes to every backend; not read.

        Returns:
            Loss (), and (P,), or (S,) of a sub-network.
        """
        rows, lin = _tensor(x), self._linearisation()
        if self.stochastic:
            diagonal = monte_carlo_diagonal(lin, rows, self._hessian, n_probes=self.num_samples).mean
        else:
            diagonal = ggn_diagonal(lin, rows, self._hessian)
        vector = torch.cat([diagonal[name].flatten() for name in self.params_dict])
        if self.subnetwork_indices is not None:
            vector = vector[self.subnetwork_indices]
        return self._loss(rows, y), vector.to(self.params[0].dtype)

    @torch.no_grad()
    def full(
        self,
        x: Tensor | MutableMapping[str, Any],
        y: Tensor,
        **kwargs: Any,  # noqa: ANN401 - the interface's
    ) -> tuple[Tensor, Tensor]:
        r"""Loss and dense curvature.

        Args:
            x: Inputs (B, \*data).
            y: Targets (B, \*O), or classes (B, ...).
            **kwargs: What laplace-torch passes to every backend; not read.

        Returns:
            Loss (), and (P, P), or (S, S) of a sub-network.
        """
        self._check_exact("full")
        rows = _tensor(x)
        masks = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in self.params_dict.items()}
        if self.subnetwork_indices is None:
            block = ggn_block(self._linearisation(), rows, self._hessian, masks)
        else:
            masks, rank = masks_of(self.subnetwork_indices, self.params_dict)
            block = ggn_block(self._linearisation(), rows, self._hessian, masks)[rank][:, rank]
        return self._loss(rows, y), block.to(self.params[0].dtype)

    @torch.no_grad()
    def kron(
        self,
        x: Tensor | MutableMapping[str, Any],
        y: Tensor,
        N: int,
        **kwargs: Any,  # noqa: ANN401, N803
    ) -> tuple[Tensor, Kron]:
        r"""Loss and Kronecker factors.

        Args:
            x: Inputs (B, \*data).
            y: Targets (B, \*O), or classes (B, ...).
            N: Rows of the data set.
            **kwargs: What laplace-torch passes to some backends; not read.

        Returns:
            Loss (), and one entry for each trainable parameter.

        Raises:
            UnsupportedError: As said of the class.
        """
        self._check_exact("kron")
        if self.subnetwork_indices is not None:
            raise UnsupportedError(
                "the whole network", "Kronecker factors of a sub-network", "Use hessian_structure='full' or 'diag'."
            )
        rows, lin = _tensor(x), self._linearisation()
        curvature = kronecker_factors(lin, rows, self._hessian)
        return self._loss(rows, y), Kron(self._kron_entries(curvature, rows, len(rows) / N))

    def jacobians(self, x: Tensor | MutableMapping[str, Any], enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        r"""Jacobians and outputs by ``torch.func``; outputs of any shape are flattened, so that images work.

        Args:
            x: Inputs (B, \*data).
            enable_backprop: Keep the graph.

        Returns:
            (B, O, P) and (B, O).

        Cost: O backward passes a row; memory B * O * P, which no backend of laplace-torch escapes.
        """
        rows = _tensor(x)

        def outputs(params: Params, row: Tensor) -> tuple[Tensor, Tensor]:
            flat = torch.func.functional_call(self.model, (params, self.buffers_dict), (row[None],)).flatten()
            return flat, flat

        jacobian = torch.func.jacrev(outputs, has_aux=True, chunk_size=_OUTPUTS_AT_ONCE)
        # the rows share the parameters, each has a Jacobian of its own
        per_row = torch.func.vmap(jacobian, in_dims=(None, 0), chunk_size=self.chunk_size or _ROWS_AT_ONCE)
        leaves, values = per_row(self.params_dict, rows)
        matrix = torch.cat([leaf.flatten(2) for leaf in leaves.values()], -1)
        if self.subnetwork_indices is not None:
            matrix = matrix[..., self.subnetwork_indices]
        return (matrix, values) if enable_backprop else (matrix.detach(), values.detach())

    def _linearisation(self) -> Linearisation:
        """The engine's constants, kept from batch to batch for as long as weights and buffers keep their values."""
        params = parameters_of(self.model)
        state = params | {name: value.clone() for name, value in self.model.named_buffers()}
        # by value: laplace-torch writes through .data, which leaves neither identity nor version behind
        is_same = all(name in self._state and torch.equal(self._state[name], value) for name, value in state.items())
        if self._cached is None or not is_same:
            self._cached = Linearisation(self.model, params, chunk_size=self.chunk_size)
            self._state = state
        return self._cached

    def _hessian(self, outputs: Tensor) -> Tensor | BlockHessian:
        """Hessian of the loss in the outputs, laplace-torch's: unit noise, or the softmax over the last axis."""
        if self.likelihood == Likelihood.REGRESSION:
            return outputs.new_ones(())
        p = torch.softmax(outputs, -1)
        return BlockHessian(torch.diag_embed(p) - p[..., :, None] * p[..., None, :], axis=outputs.dim() - 1)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        outputs = self.model(x)
        if self.likelihood == Likelihood.CLASSIFICATION:
            outputs, y = outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1)
        return self.factor * self.lossfunc(outputs, y).detach()

    def _check_exact(self, structure: str) -> None:
        if self.stochastic:
            raise UnsupportedError(
                "stochastic=True with hessian_structure='diag'", repr(structure), "Leave stochastic out: it is exact."
            )

    def _kron_entries(self, curvature: KroneckerCurvature, rows: Tensor, share: float) -> list[Any]:
        """One list of factors for each trainable parameter, in their order."""
        entries: dict[str, list[Tensor]] = {}
        for name, factors in curvature.blocks.items():
            layout = factors.layout
            if layout.groups > 1 or layout.is_transposed:
                kind = "transposed" if layout.is_transposed else "grouped"
                raise UnsupportedError(
                    "layers whose weight is (out, in, *taps), as laplace-torch's Kron holds them",
                    f"the {kind} convolution {name!r}, whose factors it cannot hold",
                    "Use hessian_structure='diag' or 'full', or this library's own Kronecker-factored Laplace.",
                )
            n_patch = layout.n_in - (layout.bias is not None)
            inputs, outputs = factors.inputs[0, :n_patch, :n_patch] / factors.count, factors.outputs[0]
            entries[layout.weight] = [outputs.clone(), inputs * share]
            if layout.bias is not None:
                entries[layout.bias] = [outputs.clone()]
        for name, value in self.params_dict.items():
            if name in entries:
                continue
            if value.dim() != 1:
                raise UnsupportedError(
                    "weights of Linear layers and convolutions, and vectors",
                    f"{name!r} of shape {tuple(value.shape)}, which has no Kronecker factors",
                    "Use hessian_structure='diag'.",
                )
            mask = {name: torch.ones(value.shape, dtype=torch.bool)}
            entries[name] = [ggn_block(self._linearisation(), rows, self._hessian, mask)]
        dtype = self.params[0].dtype
        return [[factor.to(dtype) for factor in entries[name]] for name in self.params_dict]


def _tensor(x: Tensor | MutableMapping[str, Any]) -> Tensor:
    if not isinstance(x, Tensor):
        raise UnsupportedError("inputs in one tensor", type(x).__name__, "Use another backend for dictionaries.")
    return x
