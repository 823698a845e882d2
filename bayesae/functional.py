"""Pure functions on parameter dictionaries: names, stacking, mapping a module over weight draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bayesae.errors import NonFiniteError, ParameterError, ShapeError, UnsupportedError
from bayesae.types import Params

__all__ = [
    "at_least_float32",
    "check_complete",
    "check_is_evaluable",
    "check_finite",
    "dtype_of",
    "map_over_draws",
    "n_draws",
    "parameters_of",
    "select_draws",
    "stack_draws",
]


def parameters_of(module: nn.Module) -> Params:
    """Every parameter of ``module`` by name, detached from the graph and cloned, so that nothing is shared."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def check_complete(params: Params, module: nn.Module) -> None:
    r"""Raise unless a draw names every parameter of ``module``, no other, each of shape (S, \*shape).

    A draw may bring buffers of floats along, running statistics that were computed for its weights, say.

    Args:
        params: Draws, leaves (S, \*shape).
        module: The module that they are meant for.

    Raises:
        ParameterError: If a name is missing or unknown.
        ShapeError: If a leaf lacks its leading draw axis or draws differ in number.
    """
    expected = dict(module.named_parameters())
    missing = expected.keys() - params.keys()
    expected |= {name: value for name, value in module.named_buffers() if name in params and value.is_floating_point()}
    unknown = params.keys() - expected.keys()
    if missing or unknown:
        raise ParameterError(
            f"a value for each of the module's {len(dict(module.named_parameters()))} parameters",
            f"missing {sorted(missing)}, unknown {sorted(unknown)}",
            "A draw holds every parameter, frozen ones too: start from parameters_of(module).",
        )
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in params.values()}
    wrong = [name for name, leaf in params.items() if leaf.shape[1:] != expected[name].shape]
    if wrong or len(sizes) > 1:
        raise ShapeError(
            "leaves of shape (S, *shape) with one S",
            f"{ {name: tuple(params[name].shape) for name in wrong or params} }",
            "Give each leaf the axis of weight draws on the left, S = 1 for a single network.",
        )


def check_is_evaluable(module: nn.Module) -> None:
    """Raise if a module would draw random numbers or use a batch's own statistics when it is evaluated.

    Args:
        module: The module about to be evaluated at given weights.

    Raises:
        UnsupportedError: If a dropout layer or a layer with running statistics is in training mode, or batch
            normalisation has no running statistics.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise UnsupportedError(
                "rows that do not depend on one another",
                f"{type(layer).__name__} {name!r} without running statistics",
                "Use track_running_stats=True, or layer or group normalisation.",
            )
        if not layer.training:
            continue
        if getattr(layer, "running_mean", None) is not None:
            what = "running statistics in training mode: rows of a batch would depend on one another"
        elif isinstance(layer, nn.RReLU):
            what = "random slopes in training mode: two evaluations would differ"
        elif isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            what = "dropout in training mode: two evaluations would differ"
        else:
            continue
        raise UnsupportedError(
            "a network in evaluation mode", f"{type(layer).__name__} {name!r} with {what}", "Call model.eval()."
        )


def dtype_of(module: nn.Module) -> torch.dtype:
    """The one floating-point dtype of a module's parameters.

    Args:
        module: Any module with parameters.

    Returns:
        Their dtype.

    Raises:
        ShapeError: If parameters have several dtypes.
        ParameterError: If there is no parameter.
    """
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if not dtypes:
        raise ParameterError(
            "a module with parameters", f"{type(module).__name__} without any", "Give networks with weights."
        )
    if len(dtypes) > 1:
        raise ShapeError("one dtype throughout", f"{sorted(map(str, dtypes))}", "Call model.to(dtype).")
    return dtypes.pop()


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is narrower: sums of hundreds of terms lose their digits in half precision."""
    return x.float() if x.dtype.itemsize < 4 else x


def n_draws(params: Params) -> int:
    r"""Number S of draws in leaves (S, \*shape)."""
    return next(iter(params.values())).shape[0]


def select_draws(params: Params, draws: slice) -> Params:
    r"""Some of the draws, leaves (S', \*shape), views of the given ones."""
    return {name: leaf[draws] for name, leaf in params.items()}


def stack_draws(draws: Sequence[Params]) -> Params:
    r"""Join single parameter dictionaries into leaves (S, \*shape)."""
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def check_finite(named: Mapping[str, Tensor], what: str, fix: str) -> None:
    """Raise if a tensor holds a NaN or an infinity.

    Args:
        named: Tensors by name.
        what: What they are, for the message.
        fix: What the caller can do about it.

    Raises:
        NonFiniteError: Naming the first offender.
    """
    for name, value in named.items():
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise NonFiniteError(f"finite {what}", f"{bad} NaN or infinite values in {name!r}", fix)


def map_over_draws(
    module: nn.Module,
    params: Params,
    x: Tensor,
    x_has_draws: bool,
    use_vmap: bool,
    *,
    shared: tuple[Tensor, ...] = (),
) -> Tensor:
    r"""Evaluate ``module`` at every weight draw.

    Args:
        module: Maps (B, \*in) to (B, \*out).
        params: Leaves (S, \*shape).
        x: (B, \*in), or (S, B, \*in) if ``x_has_draws``.
        x_has_draws: Whether draw s sees its own ``x[s]``.
        use_vmap: One batched call by ``torch.func.vmap``, else a loop over draws; equal to rounding.
        shared: Further arguments, (B, ...), the same for all draws.

    Returns:
        (S, B, \*out).
    """

    def call(one: Params, rows: Tensor) -> Tensor:
        return torch.func.functional_call(module, one, (rows, *shared))

    n = n_draws(params)
    if use_vmap and n > 1:
        return torch.func.vmap(call, in_dims=(0, 0 if x_has_draws else None))(params, x)
    rows = x if x_has_draws else [x] * n
    return torch.stack([call({k: v[s] for k, v in params.items()}, rows[s]) for s in range(n)])
