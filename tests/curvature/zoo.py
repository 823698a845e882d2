"""Small networks with every kind of layer, in float64, and what brute force says of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from bayesae.curvature import BlockHessian, LowRankHessian
from bayesae.functional import parameters_of
from tests import twins


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x))) - 0.5 * x


class Skip(nn.Module):
    """Concatenates, reshapes by size, and calls functions where others use layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 5), nn.Linear(5, 4), nn.Linear(9, 8)

    def forward(self, x):
        h = F.elu(self.a(x.reshape(x.size(0), -1)))
        joined = torch.cat([h, F.dropout(self.b(h).sigmoid(), 0.5, training=False)], 1)
        return self.c(joined).view(x.shape[0], 2, 4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 3), nn.Linear(7, 7)

    def forward(self, x):
        return self.b(F.linear(torch.tanh(self.a(x)), self.a.weight.t()))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Unreadable(nn.Module):
    """Control flow that no tracer follows."""

    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        if x.shape[0] > 10**6:
            return x
        return self.a(x).sin() * self.scale


class Unknown(nn.Module):
    """Readable, with a parameter outside any layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.a = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x * self.scale)


def _decoder28(*last, n=4):
    return nn.Sequential(
        nn.Linear(2, 3 * n * n),
        nn.ReLU(),
        nn.Unflatten(1, (3, n, n)),
        nn.ConvTranspose2d(3, 2, 4, 2, 1),
        nn.BatchNorm2d(2),
        nn.LeakyReLU(0.3),
        nn.ConvTranspose2d(2, 1, 4, 2, 1),
        *last,
    )


NETWORKS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 2), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 9)),
        (5, 9),
    ),
    "norms and PReLU": lambda: (
        nn.Sequential(
            nn.Linear(7, 6),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Linear(6, 2),
            nn.Linear(2, 6),
            nn.LayerNorm(6),
            nn.PReLU(),
            nn.Linear(6, 6),
            nn.PReLU(6),
            nn.Linear(6, 7),
        ),
        (4, 7),
    ),
    "residual": lambda: (
        nn.Sequential(nn.Linear(7, 6), Residual(), nn.Linear(6, 2), nn.Linear(2, 6), Residual(), nn.Linear(6, 7)),
        (4, 7),
    ),
    "skip": lambda: (Skip(), (4, 2, 2, 2)),
    "tied": lambda: (Tied(), (4, 7)),
    "a layer used twice": lambda: (Twice(), (4, 6)),
    "unreadable": lambda: (nn.Sequential(nn.Linear(5, 6), Unreadable(), nn.Linear(6, 5)), (4, 5)),
    "wholly unreadable": lambda: (Unreadable(), (4, 6)),
    "a parameter outside a layer": lambda: (nn.Sequential(nn.Linear(5, 6), Unknown(), nn.Linear(6, 5)), (4, 5)),
    "positions": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2), nn.Linear(2, 15)),
        (4, 5, 3),
    ),
    "softmax and GLU": lambda: (
        nn.Sequential(nn.Linear(5, 8), nn.GLU(), nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 5)),
        (4, 5),
    ),
    "conv": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 4, 2, 1), nn.Flatten(), nn.Linear(48, 2), _decoder28()
        ),
        (3, 1, 16, 16),
    ),
    "conv, flat outputs": lambda: (
        nn.Sequential(nn.Flatten(), nn.Linear(256, 2), nn.Tanh(), _decoder28(nn.Sigmoid(), nn.Flatten())),
        (2, 1, 16, 16),
    ),
    "up-sampling": lambda: (
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(192, 2),
            nn.Linear(2, 8),
            nn.Unflatten(1, (2, 2, 2)),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(3, 3, 3, padding=1),
        ),
        (2, 3, 8, 8),
    ),
    "overlapping taps": lambda: (
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(256, 2),
            nn.Linear(2, 32),
            nn.Unflatten(1, (2, 4, 4)),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2, 2, 3, padding=1),
            nn.Softplus(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2, 1, 3, padding=1),
        ),
        (2, 1, 16, 16),
    ),
    "one axis": lambda: (
        nn.Sequential(
            nn.Conv1d(1, 2, 3, 2, 1),
            nn.AvgPool1d(2),
            nn.Flatten(),
            nn.Linear(8, 2),
            nn.Linear(2, 8),
            nn.Unflatten(1, (2, 4)),
            nn.ConvTranspose1d(2, 4, 4, 2, 1, groups=2),
            nn.GELU(),
            nn.ConvTranspose1d(4, 1, 5, 2, 2, output_padding=1),
        ),
        (3, 1, 16),
    ),
    "three axes": lambda: (
        nn.Sequential(
            nn.Conv3d(1, 2, 3, 2, 1),
            nn.MaxPool3d(2),
            nn.Flatten(),
            nn.Linear(2, 2),
            nn.Linear(2, 16),
            nn.Unflatten(1, (2, 2, 2, 2)),
            nn.GroupNorm(1, 2),
            nn.ConvTranspose3d(2, 1, 2, 2),
        ),
        (2, 1, 4, 4, 4),
    ),
    "dilated, grouped, same": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2),
            nn.InstanceNorm2d(4),
            nn.Softplus(),
            nn.Conv2d(4, 2, 3, padding="same"),
        ),
        (2, 2, 5, 6),
    ),
}


@cache
def build(name):
    """Network in float64, rows, and the Jacobian of every parameter: cached, since nothing may change them."""
    torch.manual_seed(3)
    network, shape = NETWORKS[name]()
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_()
    network = network.double().eval().requires_grad_(False)
    x = torch.rand(shape, dtype=torch.float64)
    jacobian = twins.output_jacobian(network, x)
    return network, x, jacobian, torch.cat([j.flatten(2) for j in jacobian.values()], -1)


def scalar(outputs):
    return outputs.new_tensor(2.5)


def diagonal(outputs):
    return outputs.sigmoid() + 0.1


def block(outputs):
    u = outputs.movedim(1, -1)
    return BlockHessian(u[..., :, None] * u[..., None, :] + 0.5 * torch.eye(u.shape[-1], dtype=u.dtype), 1)


def low_rank(outputs):
    return LowRankHessian(torch.stack([torch.sin(k * outputs) for k in (1, 2, 3)], 1), outputs.sigmoid())


HESSIANS = {"scalar": scalar, "diagonal": diagonal, "block": block, "low rank": low_rank}


def dense_hessian(hessian, outputs):
    """(B, O, O), written out entry by entry where it is in blocks."""
    n, size = len(outputs), outputs[0].numel()
    value = hessian(outputs)
    if isinstance(value, BlockHessian):
        full = outputs.new_zeros(n, size, size)
        axis = value.axis
        places = torch.arange(size).reshape(outputs.shape[1:]).movedim(axis - 1, -1).reshape(-1, outputs.shape[axis])
        for b in range(n):
            for place, one in zip(places, value.values[b].reshape(-1, *value.values.shape[-2:]), strict=True):
                full[b][place[:, None], place[None]] = one
        return full
    if isinstance(value, LowRankHessian):
        factor = value.factor.flatten(2)
        return torch.diag_embed(value.diagonal.flatten(1)) + factor.mT @ factor
    if value.dim() == 0:
        return (value * torch.eye(size, dtype=outputs.dtype)).expand(n, -1, -1)
    return torch.diag_embed(value.flatten(1))


def by_parameter(network, vector):
    """A vector (..., P) in the shapes of the parameters."""
    leaves = vector.split([p.numel() for p in network.parameters()], -1)
    return {
        k: v.reshape(*vector.shape[:-1], *p.shape) for (k, p), v in zip(network.named_parameters(), leaves, strict=True)
    }


def random_like(network, *lead, positive=False):
    make = torch.rand if positive else torch.randn
    return {k: make(*lead, *p.shape, dtype=p.dtype) for k, p in parameters_of(network).items()}
