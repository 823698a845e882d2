"""The protocol of a weight inference: a procedure in three steps, its state apart from its hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from bayesae.joint import IsotropicNormal, LogJoint
from bayesae.types import Batch, Params, WeightPosterior

__all__ = ["Info", "WeightInference", "info_of"]


@dataclass(frozen=True)
class Info:
    """What one update has to say.

    Args:
        log_joint: Estimate of log p(D, theta) / T in nats, averaged over what was updated.
    """

    log_joint: float


class WeightInference(Protocol):
    """How q(theta) is fitted: a frozen dataclass of hyper-parameters that holds no tensor of the run.

    `fit_weights` steps the triple and keeps its state in checkpoints; a person with a loop of their own calls it
    directly::

        state = inference.init(params, joint)
        for batch in batches:
            state, info = inference.update(state, batch, joint)
        posterior = inference.posterior(state, joint)
    """

    @property
    def epochs(self) -> int:
        """Passes over the data that the method wants."""
        ...

    def init(self, params: Params, joint: LogJoint) -> Any:  # noqa: ANN401 - each method has a state of its own
        """State before the first batch; ``params`` are the network's, each in its own shape."""
        ...

    def update(self, state: Any, batch: Batch, joint: LogJoint) -> tuple[Any, Info]:  # noqa: ANN401
        """State after one more batch; buffers that the state owns may be reused."""
        ...

    def posterior(self, state: Any, joint: LogJoint) -> WeightPosterior:  # noqa: ANN401
        """The family that the run leaves."""
        ...

    def pack(self, state: Any) -> Any:  # noqa: ANN401
        """A state as `bayesae.encoding.flatten` takes it: numbers, tensors, lists and dicts; it may share memory."""
        ...

    def unpack(self, packed: Any, params: Params, joint: LogJoint) -> Any:  # noqa: ANN401
        """The state again, bit for bit, for the parameters and the joint that `init` saw; it owns its tensors."""
        ...


def info_of(joint: LogJoint) -> dict[str, float]:
    """What a posterior should remember of the joint that it was fitted to: rows, and the precision of a plain prior."""
    info = {"n_data": float(joint.n_data), "temperature": joint.temperature}
    if isinstance(joint.prior, IsotropicNormal):
        info["prior_precision"] = joint.prior.precision
    return info
