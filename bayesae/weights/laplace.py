"""Laplace's approximation with the generalised Gauss-Newton matrix, in one of five structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch

from bayesae.curvature import Linearisation
from bayesae.distributed import add_over_ranks, own_rows
from bayesae.errors import DataError, NotFittedError, UnsupportedError
from bayesae.families.base import Normal
from bayesae.joint import IndependentNormal, IsotropicNormal, LogJoint
from bayesae.subset import Subset
from bayesae.types import Batch, Params
from bayesae.weights.base import Info
from bayesae.weights.evidence import Groups, MarginalLikelihood, PriorGroups
from bayesae.weights.structures import Dense, Diagonal, Eigencorrected, Kronecker, LowRank, Precision, Structure

__all__ = ["Laplace", "LaplaceState"]

_STRUCTURES: dict[str, Structure] = {
    "diagonal": Diagonal(),
    "kronecker": Kronecker(),
    "eigencorrected": Eigencorrected(),
    "low_rank": LowRank(),
    "dense": Dense(),
}


@dataclass(frozen=True)
class LaplaceState:
    """Sums over the rows of the pass at hand.

    Args:
        params: The mode, every parameter in its own shape and dtype.
        linearisation: The network there.
        subset: The uncertain weights.
        sums: What the structure has summed, float64.
        log_likelihood: Sum of log p(x | theta) over the rows of this pass, nats.
        n_seen: Rows of this pass.
        n_passes_done: Passes before this one.
    """

    params: Params
    linearisation: Linearisation
    subset: Subset
    sums: Any
    log_likelihood: float = 0.0
    n_seen: int = 0
    n_passes_done: int = 0


@dataclass(frozen=True)
class Laplace:
    r"""Gaussian posterior over weights by a second-order expansion at the mode.

    .. math:: q(\theta) = \mathcal{N}(\theta_*, \Lambda^{-1}), \quad
              \Lambda = \tfrac{1}{T} (\hat G + \lambda I), \quad
              \hat G \approx G = \sum_{i=1}^N J_i^\top H_i J_i

    with :math:`J_i` (O, P) the Jacobian of the outputs and :math:`H_i` (O, O) the Hessian of -log p(x_i | outputs).
    Outputs are summed over, N is the number of rows, and nothing is scaled by a batch. Of G the structure keeps

    ==================  =======================================================================================
    "diagonal"          its diagonal: `DiagonalNormal`
    "kronecker"         a Kronecker product a layer, weight and bias joined, and the exact diagonal of parameters
                        of layers that have none: `KroneckerNormal`
    "eigencorrected"    the Kronecker eigenbases, and G's exact diagonal in them; two passes: `KroneckerNormal`
    "low_rank"          its strongest 20 directions, and the rest of its diagonal; two passes: `LowRankNormal`;
                        `LowRank` itself sets rank and passes
    "dense"             all of it, for up to 16 384 weights: `DenseNormal`
    ==================  =======================================================================================

    The prior is N(0, 1 / lambda), with one lambda for all weights, each layer or each weight (``prior_groups``): those
    that maximise the evidence at the mode,

    .. math:: \log p(D) \approx \log p(D, \theta_*) + \tfrac{P}{2} \log 2\pi
              - \tfrac12 \log\det (\hat G + \Lambda), \quad \Lambda = \operatorname{diag}(\lambda),

    which are unique: of every group g :math:`\gamma_g = \lambda_g \lVert\theta_{*g}\rVert^2` with its effective
    number of weights :math:`\gamma_g = \sum_{i \in g} 1 - \lambda_i (\hat G + \Lambda)^{-1}_{ii}`
    (`weights.evidence.MarginalLikelihood`). P, prior and determinant count the chosen weights alone: the evidence of a
    small subset takes all others as known, over-states what the data say and compares with no other subset's.
    Where the likelihood's ``is_fisher``, H is the Fisher information and the evidence the one with it.

    Args:
        structure: A name from the table, or a `LowRank`.
        subset: The uncertain weights: a `Subset`, or name patterns as in `Subset.of`; all by default. Kronecker
            structures want whole layers.
        tunes_prior: Whether lambda comes from the evidence, so that the joint's own precision is not read; else
            it is the joint's. The mean stays where training left it either way.

        prior_groups: Weights that share a precision where it is tuned: "all"; "layer", the parameters of one module;
            or "weight" (automatic relevance determination), not for Kronecker structures. By layer or weight a
            precision stays within 1e-6 and 1e12, where weights at 0 end, and is the joint's where there is no
            curvature.

    It leaves a Normal that is linearised by default: sampling a Laplace posterior through the network itself
    leaves the region where the expansion holds, its best-known failure. Its ``info`` has ``log_evidence`` (nats, at
    T = 1), ``n_effective``, ``prior_precision`` (the geometric mean over weights; with groups by layer also
    ``prior_precision.<layer>``, by weight ``n_pruned``, how many are at 1e12), ``n_data``, ``temperature`` and
    ``noise_scale`` (where the likelihood has one; of several the geometric mean).

    A structure of several passes wants exactly ``joint.n_data`` rows in each, pass after pass; one of one pass takes
    any number and scales the sums to ``joint.n_data``.

    Exact when: the outputs are linear in theta and the likelihood is Gaussian ("dense"); and beyond that the columns
        of the Jacobian are orthogonal ("diagonal"), there is one linear layer ("kronecker", "eigencorrected"), or
        the rank of G is at most the structure's ("low_rank").
    Biased when: theta_* is not a mode. The best precision of a weight is that of its value at the mode, which a wide
        prior does not pull in: by weight it wants training in between (`bayesae.Evidence`). "diagonal" always
        over-states certainty along correlated weights, and its determinant over-states the evidence's penalty;
        Kronecker structures do so across layers.
    Cost: one forward and about one backward pass of small matrices per batch and pass ("diagonal", "kronecker");
        30 products with G per batch and pass ("low_rank"); an eigendecomposition of every factor, or of (P, P)
        ("dense"); memory P, the sum of in^2 + out^2 over layers, 60 P, or P^2.

    Raises:
        UnsupportedError: If a layer has no curvature rule, the prior is neither an `IsotropicNormal` nor an
            `IndependentNormal`, the code is stochastic, there is nothing to tune a prior on (weights all 0, no observed
            entry), structure or groups are unknown, it would not fit into memory, the subset cuts a layer that a
            Kronecker structure keeps whole, or such a layer is to have several precisions.
        NotFittedError: If no row was seen, or a structure of several passes has not seen all of them.
        DataError: If a structure of several passes gets another ``n_data`` than a pass has rows, or a pass of it does
            not end with a batch.

    References:
        | A Practical Bayesian Framework for Backpropagation Networks (MacKay, 1992)
        | A Scalable Laplace Approximation for Neural Networks (Ritter, Botev, Barber, 2018): "kronecker"
        | Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis (George et al., 2018):
          "eigencorrected"
        | Laplacian Autoencoders for Learning Stochastic Representations (Miani et al., 2022)
        | Departure: exact sums, with the likelihood's own Hessian and an estimated noise variance.
    """

    structure: str | Structure = "diagonal"
    subset: Subset | Sequence[str] = ("**",)
    tunes_prior: bool = True
    prior_groups: PriorGroups = "all"

    def __post_init__(self) -> None:
        is_name = isinstance(self.structure, str)
        if not (self.structure in _STRUCTURES if is_name else isinstance(self.structure, Structure)):
            expected = f"a structure, one of {list(_STRUCTURES)} or LowRank(...)"
            got = repr(self.structure) if is_name else type(self.structure).__name__
            fix = "Weights are chosen by subset=, as in Laplace(subset=('decoder.**',))."
            raise UnsupportedError(expected, got, fix)
        if self.prior_groups not in (known := get_args(PriorGroups)):
            raise UnsupportedError(
                f"prior_groups, one of {list(known)}", repr(self.prior_groups), "'all' is one number."
            )
        if (
            self.prior_groups == "weight"
            and self.tunes_prior
            and isinstance(self._structure, Kronecker | Eigencorrected)
        ):
            raise UnsupportedError(
                "one prior precision a layer for Kronecker factors: another one in each entry has no Kronecker basis",
                "prior_groups='weight'",
                "Use prior_groups='layer', or structure='diagonal', 'low_rank' or 'dense'.",
            )

    @property
    def epochs(self) -> int:
        """Passes over the data that the structure wants: 1 or 2, of `LowRank` its own."""
        return self._structure.n_passes

    @property
    def _structure(self) -> Structure:
        return _STRUCTURES[self.structure] if isinstance(self.structure, str) else self.structure

    def init(self, params: Params, joint: LogJoint) -> LaplaceState:
        """No row seen."""
        if not isinstance(joint.prior, IsotropicNormal | IndependentNormal):
            expected = "an IsotropicNormal or IndependentNormal prior"
            raise UnsupportedError(expected, type(joint.prior).__name__, "Give its precisions.")
        if not joint.is_deterministic:
            raise UnsupportedError(
                "a deterministic code, so that x gives the outputs", "a stochastic one", "Use codes=codes.encode."
            )
        if self.epochs > 1 and joint.rows_of_pass != joint.n_data:
            got = f"n_data = {joint.n_data} for {joint.rows_of_pass} rows"
            fix = "Structures of one pass, such as 'kronecker', scale their sums to any n_data."
            raise DataError(f"n_data rows in each of the {self.epochs} passes of {self.structure!r}", got, fix)
        subset = self.subset if isinstance(self.subset, Subset) else Subset.of(joint.network, self.subset)
        subset.check(params)
        linearisation = Linearisation(joint.network, params)
        return LaplaceState(params, linearisation, subset, self._structure.start(linearisation, subset))

    @torch.no_grad()
    def update(self, state: LaplaceState, batch: Batch, joint: LogJoint) -> tuple[LaplaceState, Info]:
        """Add the rows of one batch; begins the next pass where one is complete."""
        if self.epochs > 1:
            state = self._at_pass(state, len(batch.x), joint.n_data)
        n_rows, batch = len(batch.x), own_rows(batch)
        hessian = joint.likelihood.output_hessian
        mask = None if batch.mask is None else joint.likelihood.output_mask(batch.mask)
        x, sums = joint.inputs(batch), state.sums
        params = {name: leaf[None] for name, leaf in state.params.items()}
        own = x.new_zeros((), dtype=torch.float64)
        if len(x):  # a rank may have no row
            sums = self._structure.add(sums, state.linearisation, state.subset, x, hessian, mask)
            own = joint.per_example(params, batch).double().sum()
        log_likelihood = float(add_over_ranks([own])[0])
        new = replace(
            state,
            sums=sums,
            log_likelihood=state.log_likelihood + log_likelihood,
            n_seen=state.n_seen + n_rows,
        )
        log_prior = float(joint.prior.log_prob(params))
        return new, Info((log_likelihood * joint.n_data / n_rows + log_prior) / joint.temperature)

    def posterior(self, state: LaplaceState, joint: LogJoint) -> Normal:
        """The Normal around the mode, with its prior precision and evidence."""
        marginal = self.marginal(state, joint)
        groups = Groups.of(self.prior_groups, state.subset) if self.tunes_prior else None
        precision, _ = marginal.maximise(groups, self.given_precision(state, joint))
        info = marginal.info(precision, groups) | self.setting(joint)
        return marginal.curvature.posterior(state.params, precision, joint.temperature, info)

    def marginal(self, state: LaplaceState, joint: LogJoint) -> MarginalLikelihood:
        """The evidence as a function of the prior, from the sums of all passes.

        Args:
            state: After the last batch.
            joint: The log-joint.

        Returns:
            It, over the chosen weights.

        Raises:
            NotFittedError: If no row was seen, or a structure of several passes has not seen all of them.
        """
        if state.n_seen == 0:
            raise NotFittedError("at least one batch", "none", "Call update first, or use fit_weights.")
        if self.epochs > 1 and (state.n_passes_done + 1, state.n_seen) != (self.epochs, joint.n_data):
            raise NotFittedError(
                f"{self.epochs} passes over n_data = {joint.n_data} rows",
                f"{state.n_passes_done} and {state.n_seen} rows",
                "Call update with all rows once for each of `epochs`.",
            )
        share = joint.n_data / state.n_seen
        curvature = self._structure.finish(self._structure.over_ranks(state.sums), state.subset, share)
        theta = state.subset.ravel(state.params).double()
        return MarginalLikelihood(curvature, theta, state.log_likelihood * share)

    def given_precision(self, state: LaplaceState, joint: LogJoint) -> Precision:
        """The joint's own precision of the chosen weights: one number where they share it, else (P,)."""
        assert isinstance(joint.prior, (IsotropicNormal, IndependentNormal))
        if isinstance(joint.prior, IsotropicNormal):
            return joint.prior.precision
        values = state.subset.ravel(joint.prior.precisions_of(state.params)).double()
        if not len(values):
            return 1.0  # of no weight: read by nothing
        return float(values[0]) if bool((values == values[0]).all()) else values

    @staticmethod
    def setting(joint: LogJoint) -> dict[str, float]:
        """What ``info`` says of the joint: n_data, temperature, and the noise scale where there is one."""
        scale = getattr(joint.likelihood, "scale", None)
        values = None if scale is None else torch.as_tensor(scale, dtype=torch.float64)
        noise = {} if values is None else {"noise_scale": float(values.log().mean().exp())}
        return {"n_data": joint.n_data, "temperature": joint.temperature} | noise

    def pack(self, state: LaplaceState) -> dict[str, Any]:
        """What a checkpoint keeps of a state: all but the network's own parameters and their linearisation.

        Args:
            state: Between two batches.

        Returns:
            Nested numbers, tensors and dataclasses that `bayesae.encoding.flatten` takes.
        """
        left_out = ("params", "linearisation")
        return {one.name: getattr(state, one.name) for one in fields(state) if one.name not in left_out}

    def unpack(self, packed: dict[str, Any], params: Params, joint: LogJoint) -> LaplaceState:
        """The state of `pack`, linearised again.

        Args:
            packed: From `pack`.
            params: The network's parameters, those of `init`.
            joint: The log-joint.

        Returns:
            The state.
        """
        packed["subset"].check(params)
        return LaplaceState(params, Linearisation(joint.network, params), **packed)

    def _at_pass(self, state: LaplaceState, n_rows: int, n_data: int) -> LaplaceState:
        """The state that ``n_rows`` more rows belong to; raises unless a pass ends with a batch."""
        if state.n_seen == n_data and state.n_passes_done + 1 < self.epochs:
            sums = self._structure.next_pass(self._structure.over_ranks(state.sums), state.subset)
            state = replace(state, sums=sums, log_likelihood=0.0, n_seen=0, n_passes_done=state.n_passes_done + 1)
        if state.n_seen + n_rows > n_data:
            raise DataError(
                f"{self.epochs} passes of n_data = {n_data} rows",
                f"{state.n_seen + n_rows} rows in pass {state.n_passes_done + 1}",
                "Is n_data the number of rows of one pass? End every pass with a batch, and stop after the last.",
            )
        return state
