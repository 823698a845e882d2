"""The peers, each in its fastest setting for a question; imported only when one is prepared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils import parameters_to_vector

from bayesae.likelihoods import Bernoulli
from bayesae.types import Params
from benchmarks.contenders import Answer, Run, kronecker_answer
from benchmarks.nets import Problem

__all__ = [
    "backpack_bernoulli",
    "hutchinson",
    "laplace_block",
    "laplace_diagonal",
    "laplace_kronecker",
    "laplace_variance",
    "read_laplace_kronecker",
    "read_vector",
    "stochman_diagonal",
    "torch_func_diagonal",
    "torch_func_variance",
]

Prepare = Callable[[Problem, int], Run]


def read_vector(problem: Problem, vector: Tensor) -> Answer:
    """A diagonal over all parameters in their order."""
    return problem.by_name(vector)


def _backend(name: str, problem: Problem, **settings: Any) -> Any:  # noqa: ANN401 - the packages carry no types
    if isinstance(problem.likelihood, Bernoulli):
        raise NotImplementedError("laplace-torch 0.3 knows regression and softmax classification, no Bernoulli outputs")
    network = problem.flat()
    backend = getattr(importlib.import_module("laplace.curvature"), name)(network, "regression", **settings)
    vars(network)["output_size"] = problem.batches[0, 0].numel()  # which `fit` would note; the Jacobians loop over it
    return backend


def laplace_diagonal(backend: str, *, is_stochastic: bool = False) -> Prepare:
    """``diag`` of a laplace-torch backend; the setting is rows at a time, 0 for all."""

    def prepare(problem: Problem, rows: int) -> Run:
        curvature = _backend(backend, problem, stochastic=is_stochastic)

        def run(x: Tensor) -> Tensor:
            return torch.stack([curvature.diag(part, part.flatten(1))[1] for part in x.split(rows or len(x))]).sum(0)

        return run

    return prepare


def laplace_kronecker(backend: str) -> Prepare:
    """``kron`` of a laplace-torch backend; the setting is rows at a time."""

    def prepare(problem: Problem, rows: int) -> Run:
        curvature = _backend(backend, problem)

        def run(x: Tensor) -> Any:  # noqa: ANN401
            parts = [curvature.kron(part, part.flatten(1), len(x))[1] for part in x.split(rows or len(x))]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total

        return run

    return prepare


def read_laplace_kronecker(problem: Problem, found: Any) -> Answer:  # noqa: ANN401
    """Factors of the weights; the one of a bias is that of its weight's outputs."""
    pairs = zip(problem.params, found.kfacs, strict=True)
    return kronecker_answer({name: (factors[0], factors[1]) for name, factors in pairs if len(factors) == 2})


def laplace_block(backend: str, n_chosen: int) -> Prepare:
    """``full`` of a sub-network, which is what `SubnetLaplace` calls; the setting is rows at a time."""

    def prepare(problem: Problem, rows: int) -> Run:
        curvature = _backend(backend, problem, subnetwork_indices=problem.chosen(n_chosen))

        def run(x: Tensor) -> Tensor:
            return torch.stack([curvature.full(part, part.flatten(1))[1] for part in x.split(rows or len(x))]).sum(0)

        return run

    return prepare


def laplace_variance(backend: str, structure: str) -> Prepare:
    """The linearised predictive with ``diagonal_output=True``; the setting is rows at a time."""

    def prepare(problem: Problem, rows: int) -> Run:
        laplace = importlib.import_module("laplace")
        matrix = importlib.import_module("laplace.utils.matrix")
        network = problem.flat()
        la = laplace.Laplace(
            network, "regression", subset_of_weights="all", hessian_structure=structure,
            backend=getattr(laplace.curvature, backend),
        )  # fmt: skip
        # what `fit` leaves behind, with everybody's posterior in place of its own
        la.mean = parameters_to_vector(network.parameters()).detach()
        la.n_data, la.n_outputs = 1, problem.batches[0, 0].numel()
        vars(network)["output_size"] = la.n_outputs
        if structure == "diag":
            la.H = torch.cat([(1 / leaf - 1).flatten() for leaf in problem.variances.values()])
        else:
            vectors, values, posterior = [], [], problem.kronecker
            for name, leaf in problem.params.items():
                if leaf.dim() == 1:
                    vectors.append([posterior.bases[name.replace("bias", "weight")][0]])
                    values.append([posterior.biases[name]])
                else:
                    vectors.append(list(posterior.bases[name]))
                    values.append(list(posterior.values[name]))
            la.H = la.H_facs = matrix.KronDecomposed(vectors, values)  # factors: only asked whether there are any

        def run(x: Tensor) -> Tensor:
            parts = x.split(rows or len(x))
            return torch.cat([la(part, pred_type="glm", diagonal_output=True)[1] for part in parts])

        return run

    return prepare


def backpack_bernoulli(problem: Problem, rows: int) -> Run:
    """BackPACK's own ``DiagGGNExact`` under ``BCEWithLogitsLoss``; the setting is rows at a time."""
    backpack, extensions = importlib.import_module("backpack"), importlib.import_module("backpack.extensions")
    network = backpack.extend(problem.flat())
    loss = backpack.extend(nn.BCEWithLogitsLoss(reduction="sum"))

    def run(x: Tensor) -> Tensor:
        total = torch.zeros(())
        for part in x.split(rows or len(x)):
            with backpack.backpack(extensions.DiagGGNExact()):
                loss(network(part), (part.flatten(1) > 0.5).to(part)).backward()
            total = total + torch.cat([p.diag_ggn_exact.flatten() for p in network.parameters()])
        return total

    return run


def hutchinson(problem: Problem, _: int) -> Run:
    """Curvlinops' diagonal estimator from one product with the GGN."""
    curvlinops = importlib.import_module("curvlinops")
    network, loss = problem.flat(), nn.MSELoss(reduction="sum")
    params = list(network.parameters())

    def run(x: Tensor) -> Tensor:
        data = [(x, x.flatten(1))]
        operator = curvlinops.GGNLinearOperator(network, loss, params, data, check_deterministic=False)
        return torch.as_tensor(curvlinops.hutchinson_diag(operator, 1)).to(x) / 2  # the loss has no half

    return run


def stochman_diagonal(problem: Problem, rows: int) -> Run:
    """The layer rules of ``stochman.nnj``, (width, width) matrices back through the layers; rows at a time.

    Its ``Sequential`` has no method for the whole, so the rules are called here as the Laplacian autoencoder's authors
    do: a diagonal at the outputs, full below, only what is read.

    Args:
        problem: The network and the likelihood.
        rows: At a time.

    Returns:
        From a batch to the diagonal in the order of the parameters.

    Raises:
        NotImplementedError: If a layer has no rule.
    """
    nnj = importlib.import_module("stochman.nnj")
    layers = []
    for layer in problem.flat():
        twin = getattr(nnj, type(layer).__name__, None)
        if twin is None:
            raise NotImplementedError(f"stochman.nnj has no {type(layer).__name__}")
        if isinstance(layer, nn.Linear):
            made = twin(layer.in_features, layer.out_features)
            made.load_state_dict(layer.state_dict())
        elif isinstance(layer, nn.Conv2d):
            made = twin(layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride, layer.padding)
            made.load_state_dict(layer.state_dict())
        elif isinstance(layer, nn.Upsample):
            made = twin(scale_factor=layer.scale_factor)
        else:
            made = twin()
        if not hasattr(made, "_jacobian_wrt_input_sandwich"):
            raise NotImplementedError(f"stochman's {type(layer).__name__} carries no second-order matrix back")
        layers.append(made.to(problem.batches.device))

    @torch.no_grad()
    def one(x: Tensor) -> Tensor:
        values = [x]
        for layer in layers:
            values.append(layer(values[-1]))
        form = problem.likelihood.output_hessian(values[-1]).expand(values[-1].shape).flatten(1)
        pieces: list[Tensor] = []
        for i in range(len(layers) - 1, -1, -1):
            is_diagonal = form.dim() == 2
            found = layers[i]._jacobian_wrt_weight_sandwich(values[i], values[i + 1], form, is_diagonal, True)
            if found is not None:
                pieces.insert(0, found.sum(0))
            if i > 0:
                form = layers[i]._jacobian_wrt_input_sandwich(values[i], values[i + 1], form, is_diagonal, False)
        return torch.cat(pieces)

    return lambda x: torch.stack([one(part) for part in x.split(rows or len(x))]).sum(0)


def torch_func_diagonal(problem: Problem, outputs_at_once: int) -> Run:
    """Rows of one image's Jacobian by ``vmap(vjp)``, so many outputs at once, squared and summed.

    Image by image: torch batches the weight gradients of one image's outputs into one product. Several images at once,
    ``jacrev`` with chunks, and per-example gradients of one output after another were tried: slower on convolutions,
    slower or equal on the MLP.

    Args:
        problem: The network and the likelihood.
        outputs_at_once: Rows of the Jacobian in one call.

    Returns:
        From a batch to the diagonal.
    """

    def run(x: Tensor) -> Params:
        total = {name: torch.zeros_like(leaf) for name, leaf in problem.params.items()}
        for row in x:
            for rows in _jacobian_rows(problem, row, outputs_at_once, by_hessian=True):
                for name, part in rows.items():
                    total[name] += part.square_().sum(0)
        return total

    return run


def torch_func_variance(problem: Problem, outputs_at_once: int) -> Run:
    """The same Jacobian rows, squared and multiplied by the variances of the weights."""

    def run(x: Tensor) -> Tensor:
        images = []
        for row in x:
            chunks = [
                torch.stack([part.square_().flatten(1) @ problem.variances[k].flatten() for k, part in rows.items()])
                for rows in _jacobian_rows(problem, row, outputs_at_once, by_hessian=False)
            ]
            images.append(torch.cat([chunk.sum(0) for chunk in chunks]))
        return torch.stack(images)

    return run


def _jacobian_rows(problem: Problem, row: Tensor, at_once: int, *, by_hessian: bool):  # noqa: ANN202
    def outputs(params: Params) -> Tensor:
        return functional_call(problem.network, params, (row[None],)).flatten()

    value, pull = vjp(outputs, problem.params)[:2]
    roots = torch.ones_like(value)
    if by_hessian:
        roots = problem.likelihood.output_hessian(value).expand(value.shape).sqrt()
    for chunk in torch.diag(roots).split(at_once):
        yield vmap(pull)(chunk)[0]
