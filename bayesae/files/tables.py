"""A fitted estimator of `bayesae.estimators` as a tree that a file can hold, and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesae.errors import FileError, NotFittedError, UnsupportedError
from bayesae.files import predictives
from bayesae.files.codes import check_method, method_of, method_tree
from bayesae.files.networks import DAMAGED, expect
from bayesae.files.predictives import likelihood_of, likelihood_tree
from bayesae.predictive import Predictive
from bayesae.training import History

__all__ = ["check_tree", "estimator_of", "is_estimator", "tree_of"]

_NAMES = ("BayesianAutoencoder", "BayesianOutlierDetector", "BayesianImputer")
_PARTS = {
    "type": (str,),
    "arguments": (dict,),
    "attributes": (dict,),
    "output": (str, type(None)),
    "history": (dict,),
    "predictive": (dict,),
}
_HISTORY = {
    "train": (list,),
    "validation": (list,),
    "best_epoch": (int,),
    "log_evidence": (list,),
    "weight_prior": (object,),
}
# what `fit` leaves beside the model, its posterior and its history; each a number, an array or column names
_ATTRIBUTES = {"_seed": int, "n_iter_": int, "n_features_in_": int, "mean_": np.ndarray, "scale_": np.ndarray}
_OF_DETECTORS = {
    "decision_scores_": np.ndarray,
    "held_out_scores_": np.ndarray,
    "labels_": np.ndarray,
    "offset_": float,
    "threshold_": float,
}
_FITTED = {"model_", "posterior_", "history_"}
_CONTAINERS = ("default", "pandas", "polars")  # of what scikit-learn's set_output asks for


def is_estimator(value: object) -> bool:
    """Whether a value is one of the estimators; does not import scikit-learn to find out."""
    if not type(value).__module__.startswith("bayesae.estimators."):
        return False
    return type(value).__name__ in _NAMES


def tree_of(estimator: Any) -> dict[str, Any]:  # noqa: ANN401 - as in save
    """Arguments, attributes, and the predictive.

    Args:
        estimator: Fitted.

    Returns:
        What `encoding.flatten` takes.

    Raises:
        NotFittedError: If it was not fitted.
        UnsupportedError: If it has an attribute that is not of `fit`.
    """
    name, values = type(estimator).__name__, dict(vars(estimator))
    if "posterior_" not in values:
        raise NotFittedError("a fitted estimator", f"{name} that was not fitted", "Call fit(X) first.")
    arguments = {key: values.pop(key) for key in estimator.get_params(deep=False)}
    if not isinstance(seed := arguments["random_state"], int | np.integer | None):
        fix = "Call set_params(random_state=None) first: what was fitted needs it no more."
        raise UnsupportedError("an int or None", f"{type(seed).__name__} at 'arguments/random_state'", fix)
    if arguments["likelihood"] is not None:
        arguments["likelihood"] = likelihood_tree(arguments["likelihood"])
    if arguments.get("method") is not None:
        arguments["method"] = method_tree(arguments["method"])
    arguments = {key: _python(value) for key, value in arguments.items()}
    kept = {key: value for key, value in values.items() if key not in _FITTED}
    names, output = kept.pop("feature_names_in_", None), kept.pop("_sklearn_output_config", {})
    if unknown := kept.keys() ^ _attributes(name).keys():
        raise UnsupportedError("attributes that fit leaves", f"{sorted(unknown)}", "Delete those of your own.")
    attributes = {key: _plain(value) for key, value in kept.items()}
    history = estimator.history_
    return {
        "type": name,
        "arguments": arguments,
        "attributes": attributes | {"feature_names_in_": None if names is None else [str(one) for one in names]},
        "output": output.get("transform"),
        "history": {field.name: getattr(history, field.name) for field in fields(history)},
        "predictive": predictives.tree_of(Predictive(estimator.model_, estimator.posterior_)),
    }


def check_tree(tree: Any) -> None:  # noqa: ANN401 - from a file
    """Raise unless the tree of a file has the parts of an estimator.

    Args:
        tree: As `encoding.unflatten` gives it.

    Raises:
        FileError: If it has not.
    """
    expect(tree, _PARTS, "an estimator")
    if tree["type"] not in _NAMES:
        raise FileError(f"an estimator among {', '.join(_NAMES)}", repr(tree["type"])[:80], DAMAGED)
    expect(tree["history"], _HISTORY, "a history")
    kinds = {
        key: (Tensor,) if kind is np.ndarray else (float, int) if kind is float else (int,)
        for key, kind in _attributes(tree["type"]).items()
    }
    expect(tree["attributes"], kinds | {"feature_names_in_": (list, type(None))}, "an estimator's attributes")
    n_columns = tree["attributes"]["n_features_in_"]
    for key in ("mean_", "scale_"):
        values = tree["attributes"][key]
        is_sound = bool(values.isfinite().all()) and (key == "mean_" or bool((values > 0).all()))
        if values.shape != (n_columns,) or values.dtype != torch.float64 or not is_sound:
            raise FileError(f"{key} of {n_columns} columns", f"{values.dtype} {tuple(values.shape)}", DAMAGED)
    if (likelihood := tree["arguments"].get("likelihood")) is not None:
        likelihood_of(likelihood)
    check_method(tree["arguments"].get("method"))
    if tree["output"] not in (None, *_CONTAINERS):
        raise FileError(f"a container of transform among {list(_CONTAINERS)}", repr(tree["output"])[:80], DAMAGED)
    predictives.check_tree(tree["predictive"])


def estimator_of(tree: dict[str, Any]) -> Any:  # noqa: ANN401 - as in save
    """The estimator of a tree that was checked."""
    from bayesae import estimators  # loads scikit-learn

    arguments = dict(tree["arguments"])
    if arguments["likelihood"] is not None:
        arguments["likelihood"] = likelihood_of(arguments["likelihood"])
    if arguments.get("method") is not None:
        arguments["method"] = method_of(arguments["method"], torch.float64)
    estimator = getattr(estimators, tree["type"])(**arguments)
    no_module = {"encoder": None, "decoder": None}
    predictive = predictives.predictive_of(tree["predictive"], no_module, torch.device("cpu"), None)
    attributes: dict[str, Any] = {key: _array(value) for key, value in tree["attributes"].items()}
    names = attributes.pop("feature_names_in_")
    if names is not None:
        attributes["feature_names_in_"] = np.array(names, dtype=object)
    if tree["output"] is not None:
        estimator.set_output(transform=tree["output"])
    vars(estimator).update(
        attributes, model_=predictive.model, posterior_=predictive.weights, history_=History(**tree["history"])
    )
    return estimator


def _attributes(name: str) -> dict[str, type]:
    return _ATTRIBUTES | (_OF_DETECTORS if name == "BayesianOutlierDetector" else {})


def _python(value: Any) -> Any:  # noqa: ANN401
    """An argument with numpy's numbers as Python's own, and its arrays as lists."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if type(value) in {list, tuple}:
        return type(value)(_python(entry) for entry in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _python(getattr(value, field.name)) for field in fields(value) if field.init}
        return replace(value, **parts)
    return value


def _plain(value: Any) -> Any:  # noqa: ANN401
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _array(value: Any) -> Any:  # noqa: ANN401
    return value.numpy() if isinstance(value, Tensor) else value
