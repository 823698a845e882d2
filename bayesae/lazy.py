"""Libraries that are imported on first use, and without their side effects."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch.distributions import Distribution

__all__ = ["import_zuko"]


def import_zuko() -> ModuleType:
    """The zuko library, imported without its side effect.

    Importing it switches the validation of ``torch.distributions`` off for the whole process; this puts back what was.

    Returns:
        The module.
    """
    validates = Distribution._validate_args
    try:
        return importlib.import_module("zuko")
    finally:
        Distribution.set_default_validate_args(validates)
