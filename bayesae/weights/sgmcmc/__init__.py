"""Markov chains over weights: with gradients of batches, and two exact references with all rows."""

from bayesae.weights.sgmcmc.dynamics import SGHMC, SGLD, SGNHT
from bayesae.weights.sgmcmc.hmc import HMC, MALA
from bayesae.weights.sgmcmc.preconditioners import RMSProp, ScaleAdaptation
from bayesae.weights.sgmcmc.schedules import Cyclical, Decay

__all__ = ["HMC", "MALA", "SGHMC", "SGLD", "SGNHT", "Cyclical", "Decay", "RMSProp", "ScaleAdaptation"]
