"""Moments of a mixture from those of its components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bayesae.draws import Moments

__all__ = ["mixed"]


def mixed(parts: Sequence[Moments]) -> Moments:
    r"""The law of total variance over equally probable components.

    .. math:: \operatorname{Var}[x] = \tfrac1C \sum_c \operatorname{Var}_c[x]
              + \tfrac1C \sum_c \big(\mathbb{E}_c[x] - \mathbb{E}[x]\big)^2

    Args:
        parts: Closed forms of the C components for the same rows.

    Returns:
        Moments of the mixture; what differs between components is variance due to the weights.
    """
    means = torch.stack([part.mean for part in parts])
    within = {
        name: torch.stack([getattr(part, name) for part in parts]).mean(0) for name in ("noise", "code", "weights")
    }
    weights = within.pop("weights") + means.var(0, correction=0)
    return replace(parts[0], mean=means.mean(0), weights=weights, **within)
