"""Bijections of codes with known log-determinants, and the code posterior that is a law pushed through one."""

from bayesae.codes.flows.autoregressive import AutoregressiveFlow
from bayesae.codes.flows.base import Flow, LawFamily
from bayesae.codes.flows.elementary import Planar, Radial
from bayesae.codes.flows.flowed import Flowed
from bayesae.codes.flows.zuko import Zuko, import_zuko

__all__ = ["AutoregressiveFlow", "Flow", "Flowed", "LawFamily", "Planar", "Radial", "Zuko", "import_zuko"]
