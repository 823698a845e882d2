"""What a step of training is made of: schedules, low precision, accumulation, clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesae.codes import CodePosterior, modules_of
from bayesae.errors import DataError, NonFiniteError, UnsupportedError
from bayesae.models import Autoencoder, Bound
from bayesae.objectives.base import Objective, at_progress, climbed
from bayesae.schedules import Schedule, as_number, check_schedule, factor_at
from bayesae.types import Batch, WeightPrior

__all__ = ["Stepper", "check_callable", "check_prior"]


def check_callable(**functions: object) -> None:
    """Raise unless all of these can be called.

    Args:
        **functions: By the name of their argument; None is one that was left out.

    Raises:
        UnsupportedError: Naming the first that cannot.
    """
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise UnsupportedError(f"a function as {name}", repr(value), "Leave it out for the default.")


def check_prior(weight_prior: object) -> None:
    """Raise unless this is a weight prior, or None.

    Raises:
        UnsupportedError: If it has no ``log_prob``.
    """
    if weight_prior is not None and not callable(getattr(weight_prior, "log_prob", None)):
        expected, fix = "a weight prior, with log_prob(params)", "IsotropicNormal(precision) makes one of a number."
        raise UnsupportedError(expected, repr(weight_prior), fix)


class _LowPrecision(Bound):
    """The live model with its networks under autocast; codes and outputs come back in the weights' dtype."""

    def __init__(self, model: Autoencoder, dtype: torch.dtype) -> None:
        super().__init__(model, None)
        self.dtype = dtype

    def encode_parameters(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            parameters = super().encode_parameters(x, context)
        return parameters.to(self.model.reference.dtype)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        with torch.autocast(z.device.type, self.dtype):
            outputs = super().decode(z, context)
        return outputs.to(self.model.reference.dtype)


@dataclass
class Stepper:
    r"""One step of the optimiser, from one batch or from several.

    .. math:: \nabla \Big[ -\tfrac{1}{\sum_j B_j} \sum_j \sum_{i=1}^{B_j} \ell(x_{ij}, \theta)
              - \tfrac1N \log p(\theta) \Big]

    Args:
        model: Trained in place.
        optimiser: Holds the trainable parameters.
        objective: Reduction of draws to (S, B), or to one for the decoder and one for the encoder and the codes' own
            networks, which then follow the gradients of one set of draws.
        codes: How codes are drawn.
        n_latent_draws: K.
        n_data: N.
        schedule: Factor of the learning rates that the optimiser came with.
        clip_norm: Largest Euclidean norm of the gradient of all parameters; None leaves it.
        autocast: Dtype of the networks' products; None leaves them in the weights' own.

    Raises:
        UnsupportedError: If the schedule is unknown, or autocast is not bfloat16 over float32 weights.
        DataError: If ``clip_norm`` is not positive.
    """

    model: Autoencoder
    optimiser: torch.optim.Optimizer
    objective: Objective
    codes: CodePosterior
    n_latent_draws: int
    n_data: int
    schedule: Schedule
    clip_norm: float | None
    autocast: torch.dtype | None
    rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if self.clip_norm is not None and not as_number(self.clip_norm) > 0:
            raise DataError("a positive clip_norm", repr(self.clip_norm), "Leave it out to clip nothing.")
        dtypes = (self.autocast, self.model.reference.dtype)
        if self.autocast is not None and dtypes != (torch.bfloat16, torch.float32):
            # gradients of float16 underflow unless the loss is scaled, and torch leaves float64 as it is
            got = f"{self.autocast} and weights of {self.model.reference.dtype}"
            raise UnsupportedError("autocast=torch.bfloat16 and float32 weights", got, "Leave autocast out.")
        self.rates = [group["lr"] for group in self.optimiser.param_groups]

    def step(self, batches: Sequence[Batch], prior: WeightPrior, progress: float) -> list[float]:
        """Move the parameters once.

        Args:
            batches: Their gradients are summed in proportion to their rows.
            prior: p(theta).
            progress: Share of training that is done.

        Returns:
            The mean objective of each batch before the step, nats a row.

        Raises:
            NonFiniteError: If the objective is not finite.
            DataError: If the schedule gives a negative factor, or none.
        """
        self._set_rates(progress)
        self.optimiser.zero_grad(set_to_none=True)
        n_rows = sum(len(batch.x) for batch in batches)
        objective = at_progress(self.objective, progress)
        values = []
        for at, batch in enumerate(batches):
            self.model.likelihood.check(batch.explained)
            draws = self.codes(self._live(), batch, n_latent_draws=self.n_latent_draws)
            means = {name: value.mean() for name, value in climbed(objective, draws).items()}
            losses = {name: -value * (len(batch.x) / n_rows) for name, value in means.items()}
            if at == 0:
                params = {name: leaf[None] for name, leaf in self.model.network.named_parameters()}
                log_prior = prior.log_prob(params).squeeze(0) / self.n_data
                # a prior has one term a parameter, and each group takes the gradient of its own parameters
                losses = {name: loss - log_prior for name, loss in losses.items()}
            value = means["decoder"].detach()
            if not all(bool(torch.isfinite(loss)) for loss in losses.values()):
                fix = "Lower learning_rate, or scale the data to about [0, 1]."
                raise NonFiniteError("a finite objective", f"{float(value)}", fix)
            self._backward(losses)
            values.append(float(value))
        if self.clip_norm is not None:
            parameters = [leaf for group in self.optimiser.param_groups for leaf in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimiser.step()
        return values

    def _backward(self, losses: dict[str, Tensor]) -> None:
        """Add gradients: of one loss to all parameters, of two to those that each is for."""
        if len(losses) == 1:
            losses["decoder"].backward()
            return
        inference = [*self.model.encoder.parameters(), *modules_of(self.codes).parameters()]
        known = {id(leaf) for leaf in inference}
        others = [leaf for group in self.optimiser.param_groups for leaf in group["params"] if id(leaf) not in known]
        for name, leaves in (("decoder", others), ("encoder", inference)):
            leaves = [leaf for leaf in leaves if leaf.requires_grad]
            if leaves:
                losses[name].backward(inputs=leaves, retain_graph=name == "decoder")

    def _live(self) -> Bound:
        return self.model.live() if self.autocast is None else _LowPrecision(self.model, self.autocast)

    def _set_rates(self, progress: float) -> None:
        factor = factor_at(self.schedule, progress)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
