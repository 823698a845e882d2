"""`BayesianImputer`: missing entries of a table, as means, draws and intervals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state
from torch import nn

from bayesae import nets, objectives, random
from bayesae.codes import amortised
from bayesae.data import check_counts
from bayesae.errors import DataError, UnsupportedError
from bayesae.estimators.base import FLOOR, Table
from bayesae.estimators.checks import check_training
from bayesae.imputation import Imputations, Method, impute
from bayesae.imputation.pooling import check_level
from bayesae.likelihoods import Mixed, StudentT
from bayesae.models import Autoencoder
from bayesae.predictive import Predictive
from bayesae.training import fit_model, fit_weights
from bayesae.types import Batch, Likelihood
from bayesae.weights import HMC, MALA, MAP, Laplace, WeightInference

__all__ = ["BayesianImputer"]

_TRAINING_DRAWS = 10  # K of the bound
_OF_PLAIN_CODES = (Laplace, HMC, MALA)
_FIGURES = ("ess", "rhat", "acceptance", "n_divergent", "residual")
_WIDTH, _MOST_LATENTS = 128, 32


def _n_outputs(likelihood: Likelihood, n_columns: int) -> int | tuple[int, int]:
    """What the decoder gives a row: a number for every parameter of a column's law."""
    if isinstance(likelihood, Mixed):
        return likelihood.n_outputs
    n = getattr(likelihood, "n_parameters", 1)
    return n_columns if n == 1 else (n_columns, n)


class BayesianImputer(OneToOneFeatureMixin, TransformerMixin, Table):
    r"""A Bayesian variational autoencoder of an incomplete table as a scikit-learn transformer.

    ``fit`` scales the columns by what is observed of them and trains encoder and decoder on the missing-data
    importance-weighted bound, with early stopping. ``transform`` puts means where entries are NaN, ``sample`` draws
    them, ``interval`` says between what they lie, ``diagnose`` how far the draws can be trusted.

    .. math:: \max_\theta \sum_i \log \tfrac1K \sum_k \frac{p(x_{i,o} \mid z_{ik})\, p(z_{ik})}{q(z_{ik} \mid x_{i,o})},
              \qquad x_m \sim \iint p(x_m \mid z, \theta)\, p(z \mid x_o, \theta)\, q(\theta)\, dz\, d\theta

    Columns of counts, of zeros and ones or of numbered classes are what ``likelihood`` says, with
    ``standardise=False``; `likelihoods.Mixed` has one for every column. A column without any observed entry is refused
    and not dropped. What was missing as columns of its own, ``add_indicator`` elsewhere, is scikit-learn's
    ``MissingIndicator`` in a union.

    Args:
        latent_dim: Size of the code. None: as many as columns, 32 at most; dimensions that explain nothing fall back to
            the prior, and cost time alone.
        hidden: Widths of the encoder's hidden layers (rectifiers); the decoder's are these reversed. None: one of 128.
        likelihood: Of scaled columns. None: ``StudentT(per_output=True, floor=0.01)``.
        weights: Method of the weight posterior, one that takes codes that are drawn: `weights.Ensemble`, `MeanField`,
            `OnlineLaplace`, say. None: the weights as they were trained (`weights.MAP`).
        standardise: Whether columns are centred and divided by their standard deviation first. False for a likelihood
            of counts or of zeros and ones.
        epochs: Passes over the rows, at most.
        batch_size: Rows a step; None: a twentieth of the rows, between 16 and 512.
        learning_rate: Of Adam.
        patience: Epochs without a better held-out bound after which training stops and goes back to the best; None
            trains all epochs and keeps the last.
        validation_fraction: Share of the rows that is held out of the training, for stopping and the noise.
        random_state: As of `BayesianAutoencoder`; what is drawn for a table is the same at every call.
        method: How codes are drawn given what is observed, an object of `bayesae.imputation`. None: importance
            resampling from a Laplace approximation, as of `impute`.
        n_draws: Draws that means and intervals are made of.

    Attributes:
        model_: The trained `Autoencoder`, on scaled columns.
        posterior_: The weight posterior.
        history_: `History` of the training.
        mean_, scale_: What columns were centred and divided by, (D,).
        n_iter_: Epochs run.
        n_features_in_, feature_names_in_: As scikit-learn has them.

    Exact when: the model is, in the limit of many draws.
    Biased when: entries are missing because of what they would have been (not at random).
    Cost: ``epochs`` passes at most with K = 10 codes a row; then those of `impute` for every row with something
        missing.

    References:
        | MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets (Mattei, Frellsen, 2019,
          https://arxiv.org/abs/1812.02633)

    Example:
        >>> import numpy as np
        >>> rows = np.random.RandomState(0).randn(60, 4)
        >>> rows[::3, 1] = np.nan
        >>> filled = BayesianImputer(epochs=2, random_state=0).fit_transform(rows)
        >>> bool(np.isnan(filled).any())
        False
    """

    def __init__(
        self,
        latent_dim: int | None = None,
        hidden: Sequence[int] | None = None,
        likelihood: Likelihood | None = None,
        weights: WeightInference | None = None,
        standardise: bool = True,
        epochs: int = 300,
        batch_size: int | None = None,
        learning_rate: float = 3e-3,
        patience: int = 30,
        validation_fraction: float = 0.2,
        random_state: int | np.random.RandomState | None = None,
        method: Method | None = None,
        n_draws: int = 50,
    ) -> None:
        super().__init__(
            latent_dim,
            hidden,
            likelihood,
            weights,
            standardise,
            epochs,
            batch_size,
            learning_rate,
            patience,
            validation_fraction,
            random_state,
        )
        self.method = method
        self.n_draws = n_draws

    def fit(self, X: object, y: object = None) -> Self:  # noqa: N803
        """Scale the columns, train the network on what is observed, and put the posterior over its weights.

        Args:
            X: Rows, (N, D), N of at least 2, NaN where an entry is missing. Every column is observed somewhere.
            y: Ignored.

        Returns:
            The estimator itself.

        Raises:
            DataError: If an argument is out of its range, or a column has no observed entry.
            UnsupportedError: If ``likelihood``, ``weights`` or ``method`` is none, or ``weights`` wants a plain code.
        """
        table = self._validated(X, ensure_min_samples=2)
        check_training(self)
        check_counts(n_draws=self.n_draws)
        if isinstance(self.weights, _OF_PLAIN_CODES):
            fix = "Use bae.weights.Ensemble(5), MeanField() or OnlineLaplace()."
            raise UnsupportedError("a method of the weights that takes drawn codes", type(self.weights).__name__, fix)
        if self.method is not None and (isinstance(self.method, type) or not isinstance(self.method, Method)):
            fix = "Give an object, method=bae.imputation.CodeHMC() say."
            raise UnsupportedError("a method of imputation, or None", repr(self.method)[:80], fix)
        empty = np.flatnonzero(np.isnan(table).all(0))
        if len(empty):
            got = f"none in columns {empty[:5].tolist()} ({len(empty)} in all)"
            raise DataError("an observed entry in every column", got, "Leave those columns out.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._set_scale(table)
        rows = self._scaled(table)
        kept, held_out = self._split(len(table), seed)
        train, validation = (Batch(rows[chosen], ~rows[chosen].isnan()) for chosen in (kept, held_out))
        hidden, n_latents = self._sizes(table.shape[1])
        size = self._rows_a_step(len(kept))
        likelihood = StudentT(per_output=True, floor=FLOOR) if self.likelihood is None else self.likelihood
        options: dict[str, Any] = {"batch_size": size, "codes": amortised, "progress": False}
        with random.scope(seed):
            encoder = nets.mlp(table.shape[1], hidden, (n_latents, 2), activation=nn.ReLU).double()
            n_outputs = _n_outputs(likelihood, table.shape[1])
            decoder = nets.mlp(n_latents, hidden[::-1], n_outputs, activation=nn.ReLU).double()
            self.model_ = Autoencoder(encoder, decoder, copy.deepcopy(likelihood))
            self.history_ = fit_model(
                self.model_,
                train,
                validation=validation,
                epochs=self.epochs,
                patience=self.patience,
                learning_rate=self.learning_rate,
                objective=objectives.iwae,
                n_latent_draws=_TRAINING_DRAWS,
                **options,
            )
            method = MAP() if self.weights is None else self.weights
            self.posterior_ = fit_weights(
                method, self.model_, train, objective=objectives.iwae, n_latent_draws=_TRAINING_DRAWS, **options
            )
        self._seed = seed
        self.n_iter_ = len(self.history_.train)
        return self

    def transform(self, X: object) -> np.ndarray:  # noqa: N803
        r"""Put the predictive mean where entries are missing: what has the smallest squared error.

        Args:
            X: Rows, (N, D), NaN where an entry is missing.

        Returns:
            (N, D), in the dtype and units of X; what was observed is as given. A row without any observed entry gets
            the mean of the prior, with a warning. The mean is that of ``n_draws`` draws, the same at every call with
            the same table; a row alone, or among others, has other draws of the same law.

        Raises:
            UnsupportedError: If data are classes without an order.
        """
        table = self._checked(X)
        imputed = self._imputations(table, keep_draws=False)
        if imputed is None:
            return table.copy()
        if imputed.moments.likelihood.is_nominal:
            raise UnsupportedError("columns with a mean", "classes without an order", "Use sample.")
        return self._filled(table, imputed.mean)

    def sample(self, X: object, n_draws: int | None = None) -> np.ndarray:  # noqa: N803
        r"""Completed tables, each with missing entries drawn.

        Args:
            X: Rows, (N, D), NaN where an entry is missing.
            n_draws: M; None takes that of the estimator.

        Returns:
            (M, N, D), in the dtype and units of X. Analyse each and pool the results by `imputation.pool`. Draws of an
            ensemble of S networks stand network after network, M / S of each, rounded down or up; pooling wants as many
            of each: give an ``n_draws`` that S divides, and ``n_nests=imputer.posterior_.n_atoms``.
        """
        table = self._checked(X)
        imputed = self._imputations(table, n_draws)
        if imputed is None:
            return np.repeat(table[None], self.n_draws if n_draws is None else n_draws, 0)
        return np.stack([self._filled(table, one) for one in imputed.draws])

    def interval(
        self,
        X: object,  # noqa: N803
        level: float = 0.9,
        n_draws: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        r"""Central intervals of the missing entries.

        Args:
            X: Rows, (N, D), NaN where an entry is missing.
            level: In (0, 1).
            n_draws: M; None takes that of the estimator.

        Returns:
            Lower and upper bounds, (N, D) each, in the dtype and units of X; both are the value where it was observed.

        Exact when: as of `Imputations.interval`.

        Raises:
            DataError: If the level is none, ``n_draws`` no count, or too small for the level.
        """
        table = self._checked(X)
        check_level(level)
        imputed = self._imputations(table, n_draws)
        if imputed is None:
            return table.copy(), table.copy()
        low, high = imputed.interval(level)
        return self._filled(table, low), self._filled(table, high)

    def diagnose(self, X: object, n_draws: int | None = None) -> dict[str, np.ndarray]:  # noqa: N803
        r"""How the draws of every row went: the figures behind the warnings, of the draws that ``transform`` makes.

        Args:
            X: Rows, (N, D), NaN where an entry is missing.
            n_draws: M; None takes that of the estimator.

        Returns:
            ``ess``, ``rhat``, ``acceptance``, ``n_divergent`` and ``residual``, as of `imputation.Imputations`, (N,)
            each; NaN for rows with nothing missing, and for what the method has no figure of. ``residual`` is in units
            of scaled columns.
        """
        table = self._checked(X)
        imputed = self._imputations(table, n_draws, keep_draws=False)
        figures = {name: np.full(len(table), np.nan) for name in _FIGURES}
        for name, values in figures.items():
            found = getattr(imputed, name, None)
            if found is not None:
                values[np.isnan(table).any(1)] = found.numpy()
        return figures

    def _imputations(
        self, table: np.ndarray, n_draws: int | None = None, *, keep_draws: bool = True
    ) -> Imputations | None:
        """Of the rows with something missing; None if there are none."""
        n = self.n_draws if n_draws is None else n_draws
        check_counts(n_draws=n)
        rows = table[np.isnan(table).any(1)]
        if not len(rows):
            return None
        predictive = Predictive(self.model_, self.posterior_, amortised)
        options = {"method": self.method, "n_draws": n, "seed": self._seed, "keep_draws": keep_draws}
        return impute(predictive, self._scaled(rows), **options)

    def _filled(self, table: np.ndarray, rows: torch.Tensor) -> np.ndarray:
        """A table with the entries of scaled rows where its own are missing."""
        filled, is_missing = table.copy(), np.isnan(table)
        values = (rows.numpy() * self.scale_ + self.mean_).astype(table.dtype)
        filled[is_missing] = values[is_missing[is_missing.any(1)]]
        return filled

    def _sizes(self, n_columns: int) -> tuple[list[int], int]:
        hidden, n_latents = super()._sizes(n_columns)
        hidden = [_WIDTH] if self.hidden is None else hidden
        return hidden, min(n_columns, _MOST_LATENTS) if self.latent_dim is None else n_latents

    def _validated(self, X: Any, **options: Any) -> np.ndarray:  # noqa: ANN401, N803
        return super()._validated(X, ensure_all_finite="allow-nan", **options)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
