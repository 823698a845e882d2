"""Functions of a network's graph, which have no parameters: how each makes its step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves, tree_map

from bayesae.curvature.elementwise import ELEMENTWISE_FUNCTIONS, elementwise_step
from bayesae.curvature.shapes import CONCATENATIONS, PERMUTATIONS, concat_step, permute_step
from bayesae.curvature.steps import AddStep, OpaqueStep, ReshapeStep, Step
from bayesae.errors import UnsupportedError

__all__ = ["Given", "NotAStepError", "Ref", "call", "check_overwrites", "function_step", "given_value"]

_RESHAPES = frozenset("flatten reshape view unflatten squeeze unsqueeze reshape_as view_as".split())
_ADD, _SUBTRACT = frozenset("add iadd add_".split()), frozenset("sub isub sub_ subtract".split())


class NotAStepError(Exception):
    """The graph does something that has no step: the network is then taken as one."""


@dataclass(frozen=True)
class Ref:
    """Stands for the value of a step among the arguments of an operation."""

    index: int


@dataclass(frozen=True)
class Given:
    """Stands for what is computed from the data alone: it has a row for every datum, and no parameter moves it.

    Args:
        value: A tensor, or several in a tuple.
    """

    value: Any


def check_overwrites(node: fx.Node, layer: nn.Module | None) -> None:
    """Refuse an operation in place whose input others read, too: the graph does not say which numbers they see."""
    what = _name(node)
    is_in_place = what.endswith("_") or what in {"iadd", "isub", "imul", "itruediv"}
    if not (is_in_place if layer is None else getattr(layer, "inplace", False)):
        return
    source = node.all_input_nodes[0]
    if len(source.users) > 1:
        raise UnsupportedError(
            "activations in place only where nobody else reads their input",
            f"{node.name!r} overwriting the output of {source.name!r}, which is read elsewhere",
            "Use inplace=False.",
        )


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    """What a function of the graph gives."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _plain(a: Any) -> Any:  # noqa: ANN401
    """What stands behind `Given`, which an operation may overwrite."""
    if not isinstance(a, Given):
        return a
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, a.value)


def given_value(node: fx.Node, args: Any, kwargs: Any, n_rows: int) -> Any:  # noqa: ANN401
    """What a function makes of the data alone.

    Args:
        node: The function.
        args: Its arguments, `Given` among them.
        kwargs: Likewise.
        n_rows: Data in the batch.

    Returns:
        `Given`, or a size or the like.

    Raises:
        NotAStepError: If it is a tensor without a row for every datum.
    """
    if _is_dropout(node, args, kwargs):
        return next(a for a in [*args, *kwargs.values()] if isinstance(a, Given))
    value = call(node, *map_aggregate((args, kwargs), _plain))  # pyright: ignore[reportGeneralTypeIssues]
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    if any(leaf.shape[:1] != (n_rows,) for leaf in tensors):
        raise NotAStepError
    return Given(value) if tensors else value


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_dropout(node: fx.Node, args: Any, kwargs: Any) -> bool:  # noqa: ANN401
    if "dropout" not in _name(node):
        return False
    if (kwargs | dict(zip(("input", "p", "training"), args, strict=False))).get("training", True):
        raise UnsupportedError(
            "a network that gives the same outputs twice",
            f"{_name(node)} {node.name!r} that draws random numbers",
            "Pass training=self.training, and call model.eval().",
        )
    return True


def function_step(node: fx.Node, args: Any, kwargs: Any, steps: list[Step], refs: list[Ref]) -> Any:  # noqa: ANN401
    """The step of a function.

    Args:
        node: The function.
        args: Its arguments, with `Ref` and `Given` among them.
        kwargs: Likewise.
        steps: Of the batch so far.
        refs: Those among the arguments, in order.

    Returns:
        A step, the `Ref` of one that is the same, or a size or the like.

    Raises:
        NotAStepError: If it gives something without a row for every datum.
    """
    if _is_dropout(node, args, kwargs):
        return refs[0]
    indices = tuple(ref.index for ref in refs)
    values = tuple(steps[i].value for i in indices)

    def run(*given: Tensor) -> Any:  # noqa: ANN401
        queue = iter(given)
        plain_args, plain_kwargs = map_aggregate(
            (args, kwargs), lambda a: next(queue).clone() if isinstance(a, Ref) else _plain(a)
        )
        return call(node, plain_args, plain_kwargs)

    what, value = _name(node), run(*values)
    if not isinstance(value, Tensor):
        if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            raise NotAStepError
        return value  # a shape, a size
    n_rows = len(steps[0].value)
    if value.shape[:1] != (n_rows,):
        raise NotAStepError
    name = f"{node.name}()"  # never that of a module
    step: Step | None = None
    if what in CONCATENATIONS:
        parts = args[0] if args else kwargs["tensors"]
        axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        plain = [steps[a.index].value if isinstance(a, Ref) else _plain(a) for a in parts]
        sources = {place: a.index for place, a in enumerate(parts) if isinstance(a, Ref)}
        step = concat_step(name, value, plain, axis, sources)
    elif what in PERMUTATIONS and len(indices) == 1:
        step = permute_step(name, run, values[0], value, indices)
    if step is not None:
        return step
    if len(indices) == 1:
        is_same_shape = value.shape == values[0].shape
        if what in _RESHAPES and value[0].numel() == values[0][0].numel():
            return ReshapeStep(name, indices, value, values[0].shape[1:])
        if is_same_shape and what in ELEMENTWISE_FUNCTIONS | _ADD | _SUBTRACT:
            return elementwise_step(name, run, values[0], indices)
    elif what in _ADD | _SUBTRACT and all(v.shape == value.shape for v in values) and len(args) == 2 and not kwargs:
        return AddStep(name, indices, value, (1.0, 1.0 if what in _ADD else -1.0))
    return OpaqueStep(name, indices, value, lambda params, *given: run(*given), values, {}, is_sized=True)
