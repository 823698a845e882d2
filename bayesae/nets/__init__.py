"""Networks as plain modules that map tensors to tensors."""

from bayesae.nets.mlp import mlp

__all__ = ["mlp"]
