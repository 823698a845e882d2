"""The questions: a network, ours, the peers, and what the time and the memory should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from bayesae.likelihoods import Bernoulli, Gaussian
from benchmarks import peers
from benchmarks.contenders import OURS, Contender, as_is, named, totals
from benchmarks.nets import Problem, conv, mlp, upsample

__all__ = ["QUESTIONS", "Question"]


@dataclass(frozen=True)
class Question:
    r"""One thing to compute.

    Args:
        name: Of the question.
        network: Makes it.
        row: Shape of one image, (\*data,).
        ours: We.
        peers: They.
        targets: Any of ``ratio`` (peer's time over ours, at least), ``over_forward_backward`` (our time over that of
            a forward and backward pass, at most) and ``peak_mb`` (our memory above the network, at most).
        batch: Rows.
        likelihood: On the outputs.
        reads: Properties of the problem to make before memory is counted.
        is_in_quick: Whether the quick run has it.
        shows_floor: Whether the time is compared with the machine's rates.
        shows_plan: Whether the record says which routes our exact diagonal takes.
        pixels: Where the question is one of a series over sizes.
        note: What a reader should know.
    """

    name: str
    network: Callable[[], nn.Sequential]
    row: tuple[int, ...]
    ours: Contender
    peers: tuple[Contender, ...] = ()
    targets: Mapping[str, float] = field(default_factory=dict)
    batch: int = 256
    likelihood: Gaussian | Bernoulli = field(default_factory=lambda: Gaussian(1.0))
    reads: tuple[str, ...] = ()
    is_in_quick: bool = True
    shows_floor: bool = False
    shows_plan: bool = False
    pixels: int | None = None
    note: str = ""

    def running(self, is_quick: bool) -> list[Contender]:
        """The peers of a quick or of a full run."""
        return [peer for peer in self.peers if peer.is_in_quick or not is_quick]

    def problem(self, device: str) -> Problem:
        """Random weights, random images; eight batches, so that what holds for all of them may be shared."""
        torch.manual_seed(0)
        network = self.network().to(device)
        generator = torch.Generator().manual_seed(0)
        return Problem(network, torch.rand(8, self.batch, *self.row, generator=generator).to(device), self.likelihood)


_LAPLACE, _BACKPACK = ("laplace", "laplace.curvature"), "laplace-torch (BackPACK)"
_CURVLINOPS, _ASDL = "laplace-torch (curvlinops)", "laplace-torch (ASDL)"

_BACKPACK_DIAGONAL = Contender(
    _BACKPACK, peers.laplace_diagonal("BackPackGGN"), peers.read_vector, (8, 16, 32), (64, None), _LAPLACE
)
_TORCH_FUNC = Contender("torch.func, chunked", peers.torch_func_diagonal, as_is, (98, 196, 392), (1, 4))
# the target is one to laplace-torch; stochman has no Laplace approximation, its layer rules are the fastest exact peer
_STOCHMAN = Contender(
    "stochman", peers.stochman_diagonal, peers.read_vector, (4, 16), (16, 64), ("stochman.nnj",), is_held_to_ratio=False
)
_DIAGONAL = (
    _BACKPACK_DIAGONAL,
    replace(
        _BACKPACK_DIAGONAL, name=_CURVLINOPS, prepare=peers.laplace_diagonal("CurvlinopsGGN"), settings=(1,),
        images=(1, 1), is_held_to_ratio=False,
    ),
    # one backward pass an output, so whole batches: with fewer images each would cost more
    replace(
        _BACKPACK_DIAGONAL, name=_ASDL, prepare=peers.laplace_diagonal("AsdlGGN"), settings=(0,), images=(None, None),
        is_held_to_ratio=False,
    ),
    _STOCHMAN,
    replace(_TORCH_FUNC, is_held_to_ratio=False),
)  # fmt: skip
_BERNOULLI = Contender("BackPACK", peers.backpack_bernoulli, peers.read_vector, (8, 16), (32, None), ("backpack",))
_KRONECKER = Contender(
    _BACKPACK, peers.laplace_kronecker("BackPackGGN"), peers.read_laplace_kronecker, (8, 16, 32), (64, None), _LAPLACE
)
_ESTIMATE = Contender(
    _BACKPACK,
    peers.laplace_diagonal("BackPackGGN", is_stochastic=True),
    lambda problem, found: totals(problem, problem.by_name(found)),
    imports=_LAPLACE,
)
_ESTIMATES = (
    _ESTIMATE,
    replace(_ESTIMATE, name=_ASDL, prepare=peers.laplace_diagonal("AsdlGGN", is_stochastic=True)),
    replace(_ESTIMATE, name="curvlinops (hutchinson_diag)", prepare=peers.hutchinson, imports=("curvlinops",)),
)
_BLOCK = Contender(_BACKPACK, peers.laplace_block("BackPackGGN", 1000), named("block"), (16,), (16, 64), _LAPLACE)


def _variances(structure: str) -> tuple[Contender, ...]:
    # in a quick run only laplace-torch's default backend, on which one image was as fast as on any
    first = Contender(
        _CURVLINOPS, peers.laplace_variance("CurvlinopsGGN", structure), named("variance"), (1,), (1, 2), _LAPLACE
    )
    others = [
        replace(first, name=name, prepare=peers.laplace_variance(backend, structure), is_in_quick=False)
        for name, backend in ((_BACKPACK, "BackPackGGN"), (_ASDL, "AsdlGGN"))
    ]
    return first, *others


_VARIANCE_BY_ROWS = replace(
    _TORCH_FUNC, prepare=peers.torch_func_variance, answer=named("variance"), is_held_to_ratio=False
)
_GENERAL = (_BACKPACK_DIAGONAL, _TORCH_FUNC)
_MLP_ROW = (784,)
_ONE_PROBE = "one probe each: relative_error is that of the layers' sums between two random estimates"
_CONV = {"ratio": 20.0}

QUESTIONS = {
    question.name: question
    for question in (
        Question(
            "exact_diagonal_mlp", mlp, _MLP_ROW, OURS["diagonal"], _DIAGONAL,
            {"ratio": 80.0, "over_forward_backward": 5.0},
        ),
        Question(
            "exact_diagonal_mlp_bernoulli", mlp, _MLP_ROW, OURS["diagonal"],
            (_BERNOULLI, *(replace(peer, settings=(1,), images=(1, 1)) for peer in _DIAGONAL[:3]), *_DIAGONAL[3:]),
            {"over_forward_backward": 25.0}, likelihood=Bernoulli(),
        ),
        Question(
            "kronecker_mlp", mlp, _MLP_ROW, OURS["kronecker"],
            (
                _KRONECKER,
                *(
                    replace(_KRONECKER, name=name, prepare=peers.laplace_kronecker(backend), settings=(0,),
                            images=(None, None))
                    for name, backend in ((_CURVLINOPS, "CurvlinopsGGN"), (_ASDL, "AsdlGGN"))
                ),
            ),
            {"ratio": 100.0, "over_forward_backward": 8.0},
        ),
        Question(
            "variance_diagonal_mlp", mlp, _MLP_ROW, OURS["diagonal variance"],
            (*_variances("diag"), _VARIANCE_BY_ROWS),
            {"ratio": 10_000.0, "peak_mb": 50.0}, batch=64, reads=("variances",),
        ),
        Question(
            "variance_kronecker_mlp", mlp, _MLP_ROW, OURS["kronecker variance"], _variances("kron"),
            {"ratio": 5_000.0, "peak_mb": 50.0}, batch=64, reads=("kronecker",),
        ),
        Question("exact_diagonal_conv28", conv, (1, 28, 28), OURS["diagonal"], (*_GENERAL, _STOCHMAN), _CONV, 64),
        Question(
            "exact_diagonal_conv32x3", lambda: conv(3, 32), (3, 32, 32), OURS["diagonal"], (*_GENERAL, _STOCHMAN),
            _CONV, 64,
        ),
        Question("exact_diagonal_upsample", upsample, (1, 28, 28), OURS["diagonal"], (*_GENERAL, _STOCHMAN), _CONV, 64),
        Question(
            "monte_carlo_diagonal_mlp", mlp, _MLP_ROW, OURS["monte carlo"], _ESTIMATES,
            {"over_forward_backward": 1.5}, note=_ONE_PROBE,
        ),
        Question(
            "monte_carlo_diagonal_conv", conv, (1, 28, 28), OURS["monte carlo"], _ESTIMATES,
            {"over_forward_backward": 1.5}, 64, note=_ONE_PROBE,
        ),
        Question(
            "dense_block_mlp", mlp, _MLP_ROW, OURS["block"],
            (_BLOCK, replace(_BLOCK, name=_CURVLINOPS, prepare=peers.laplace_block("CurvlinopsGGN", 1000),
                             settings=(1,), images=(1, 2))),
            {"ratio": 200.0, "peak_mb": 50.0},
        ),
        *(
            Question(
                f"growth_{side}x{side}", lambda side=side: mlp((side**2, 256, 64, 2)), (side**2,), OURS["diagonal"],
                batch=64, pixels=side**2,
            )
            for side in (14, 28, 56, 112)
        ),
        Question(
            "wide_mlp", lambda: mlp((784, 512, 256, 128)), _MLP_ROW, OURS["diagonal"], _GENERAL, batch=64,
            shows_plan=True,
        ),
        Question(
            "wide_conv", lambda: conv(code=128), (1, 28, 28), OURS["diagonal"], _GENERAL, batch=64, shows_plan=True,
        ),
        Question(
            "exact_diagonal_mlp_4096", mlp, _MLP_ROW, OURS["diagonal"], batch=4096, is_in_quick=False, shows_floor=True,
        ),
        *(
            Question(
                f"exact_diagonal_mlp_batch_{batch}", mlp, _MLP_ROW, OURS["diagonal"], (_BACKPACK_DIAGONAL,),
                batch=batch, is_in_quick=False,
            )
            for batch in (32, 1024)
        ),
        *(
            Question(
                f"exact_diagonal_mlp_code_{code}", lambda code=code: mlp((784, 256, 64, code)), _MLP_ROW,
                OURS["diagonal"], (_BACKPACK_DIAGONAL,), is_in_quick=False,
            )
            for code in (16, 64)
        ),
    )
}  # fmt: skip
