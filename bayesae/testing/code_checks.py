"""The conformance suite of code posteriors: what every one must do, whoever wrote it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from bayesae import random
from bayesae.codes import CodePosterior, modules_of
from bayesae.draws import Draws, concatenate_rows, concatenate_weight_draws
from bayesae.functional import select_draws, stack_draws
from bayesae.models import Autoencoder
from bayesae.testing.checks import ConformanceError
from bayesae.types import Batch, Params

__all__ = ["check_code_posterior"]

_N_WEIGHT_DRAWS = 3


def check_code_posterior(codes: CodePosterior, model: Autoencoder, x: Tensor, *, n_latent_draws: int = 2) -> None:
    """Hold a code posterior against its protocol on a model of one's own.

    Complete and finite draws of the right shapes and dtype; densities that are those of the outputs; the same seed, the
    same bits, pickled or not; the caller's generator, model and networks untouched; rows that do not depend on how they
    are put into batches, nor weight draws on one another; noise that is fresh at every call while weights are fitted;
    gradients that reach every parameter.

    Args:
        codes: The code posterior.
        model: In evaluation mode, with an encoder that suits it.
        x: Rows, (B, ...), three at least.
        n_latent_draws: K; 1 for a deterministic code.

    Raises:
        ConformanceError: Naming the clause that is broken.
    """
    before = copy.deepcopy(model.state_dict())
    batch = Batch(x, index=torch.arange(len(x)))
    params = _some_weights(model)
    generator = torch.get_rng_state()

    def run(codes: CodePosterior, params: Params, batch: Batch) -> Draws:
        with random.scope(4), torch.no_grad():
            return codes(model.at(params), batch, n_latent_draws=n_latent_draws)

    draws = run(codes, params, batch)
    _require(torch.equal(generator, torch.get_rng_state()), "a seeded run leaves the caller's generator", "it moved")
    after = model.state_dict()
    _require(all(_same(before[name], after[name]) for name in before), "an untouched model", "changed weights")

    shape = (n_latent_draws, _N_WEIGHT_DRAWS, len(x))
    n_latents = model.at(params).encode(x).shape[-1]
    wanted = {"latents": (*shape, n_latents), "log_likelihood": shape, "log_prior": shape}
    wanted |= {} if draws.log_q is None else {"log_q": shape}
    found = {name: tuple(getattr(draws, name).shape) for name in wanted}
    _require(found == wanted, f"shapes {wanted}", f"{found}")
    _require(draws.outputs is not None and draws.outputs.shape[:3] == shape, "outputs of every draw", "none or others")
    tensors = {one.name: getattr(draws, one.name) for one in fields(draws)}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    _require(all(bool(value.isfinite().all()) for value in tensors.values()), "finite draws", "NaN or infinity")
    _require(
        all(value.dtype == model.reference.dtype for value in tensors.values()),
        f"{model.reference.dtype} throughout",
        f"{ {name: value.dtype for name, value in tensors.items()} }",
    )
    decoded = model.at(params).decode(draws.latents)
    assert draws.outputs is not None
    _require(_close(decoded, draws.outputs), "outputs that are the decoder's at the latents", "others")
    _require(draws.kl is None or draws.kl.shape[:2] == shape[1:], "kl of shape (S, B, G)", f"{draws.kl}")

    again = run(pickle.loads(pickle.dumps(codes)), params, batch)
    _require(
        all(torch.equal(value, getattr(again, name)) for name, value in tensors.items()),
        "the same bits from the same seed, pickled or not",
        "others",
    )
    rows = [run(codes, params, _rows(batch, part)) for part in (slice(0, 1), slice(1, len(x)))]
    _require(
        _alike(concatenate_rows(rows), draws), "rows that do not feel their batch", "others in batches of 1 and B - 1"
    )
    parts = [run(codes, select_draws(params, part), batch) for part in (slice(0, 1), slice(1, _N_WEIGHT_DRAWS))]
    _require(_alike(concatenate_weight_draws(parts), draws), "weight draws that do not meet", "others one by one")
    if draws.log_q is not None:
        fresh = [codes(model.at(params, is_fitting=True), batch).latents for _ in range(2)]
        _require(not torch.equal(*fresh), "fresh noise at every call while weights are fitted", "the same twice")
    _check_gradients(codes, model, batch)


def _check_gradients(codes: CodePosterior, model: Autoencoder, batch: Batch) -> None:
    own = modules_of(codes)
    twin = copy.deepcopy(model).train()
    leaves = {**dict(twin.named_parameters()), **{f"codes.{name}": leaf for name, leaf in own.named_parameters()}}
    with random.scope(4):
        draws = codes(twin.live(), batch)
        value = (draws.log_likelihood if draws.log_q is None else draws.log_ratio).sum()
        gradients = torch.autograd.grad(value, [*leaves.values()], allow_unused=True)
    found = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    _require(all(bool(g.isfinite().all()) for g in found.values()), "finite gradients", "NaN or infinity")
    missing = [name for name in leaves if name not in found]
    _require(not missing, "a gradient for every parameter of model and codes", f"none for {missing}")


def _some_weights(model: Autoencoder) -> Params:
    """Three sets of weights about the model's own."""
    with random.scope(9):
        mean = {name: leaf.detach() for name, leaf in model.network.named_parameters()}
        return stack_draws([{k: v + 0.05 * s * torch.randn_like(v) for k, v in mean.items()} for s in range(3)])


def _rows(batch: Batch, part: slice) -> Batch:
    return Batch(batch.x[part], index=None if batch.index is None else batch.index[part])


def _alike(a: Draws, b: Draws) -> bool:
    names = ("latents", "log_likelihood", "log_q", "kl")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all(_close(one, other) for one, other in pairs if one is not None)


def _close(a: Tensor, b: Tensor) -> bool:
    size = 1e-9 if a.dtype == torch.float64 else 1e-3
    return a.shape == b.shape and torch.allclose(a, b, rtol=size, atol=size)


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401 - extra states
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _require(holds: bool, expected: str, got: str) -> None:
    if not holds:
        raise ConformanceError(expected, got, "See bayesae.codes.CodePosterior.")
