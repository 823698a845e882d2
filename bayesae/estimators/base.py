"""What the estimators share: a table scaled, a network of a size that fits it, a posterior, and log-densities."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from bayesae import nets, ood, random
from bayesae.errors import DataError
from bayesae.estimators.checks import check_training
from bayesae.likelihoods import StudentT
from bayesae.models import Autoencoder
from bayesae.predictive import Predictive
from bayesae.training import fit_model, fit_weights
from bayesae.types import Likelihood
from bayesae.weights import Laplace, WeightInference

__all__ = ["FLOOR", "Table", "TableModel"]

FLOOR = 1e-2  # of a column's noise, in standard deviations: finer agreement would let one column decide alone
_WIDTHS = (16, 128)
_ROWS_A_STEP = (16, 512)
_STEPS_AN_EPOCH = 20


def _moments(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of columns, also where sums or squares leave the range of floats."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        mean, deviation = table.mean(0), table.std(0)
    # squares of less than 1e-300 lose digits, or are zero
    lost = (deviation < 1e-150) & (table.max(0) != table.min(0))
    lost |= ~(np.isfinite(mean) & np.isfinite(deviation))
    if lost.any():
        columns = table[:, lost]
        _, exponent = np.frexp(np.abs(columns).max(0))
        unit = np.ldexp(columns, -exponent)  # a power of two rounds nothing
        mean[lost], deviation[lost] = np.ldexp(unit.mean(0), exponent), np.ldexp(unit.std(0), exponent)
    return mean, deviation


class Table(BaseEstimator):
    """What every estimator of a table does to it: arguments, checks, columns scaled, sizes that fit it."""

    def __init__(
        self,
        latent_dim: int | None = None,
        hidden: Sequence[int] | None = None,
        likelihood: Likelihood | None = None,
        weights: WeightInference | None = None,
        standardise: bool = True,
        epochs: int = 200,
        batch_size: int | None = None,
        learning_rate: float = 2e-3,
        patience: int = 30,
        validation_fraction: float = 0.2,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.likelihood = likelihood
        self.weights = weights
        self.standardise = standardise
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def _sizes(self, n_columns: int) -> tuple[list[int], int]:
        """Hidden widths of the encoder, and the code's size."""
        width = min(max(4 * n_columns, _WIDTHS[0]), _WIDTHS[1])
        hidden = [width] if self.hidden is None else [int(one) for one in self.hidden]
        n_latents = max(1, min(round(math.sqrt(n_columns)), n_columns - 1))
        n_latents = n_latents if self.latent_dim is None else int(self.latent_dim)
        return hidden, n_latents

    def _split(self, n_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the rows that train, and of those that are held out, each in order."""
        order = np.random.RandomState(seed).permutation(n_rows)
        n_held_out = min(max(1, math.ceil(self.validation_fraction * n_rows)), n_rows - 1)
        return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])

    def _rows_a_step(self, n_rows: int) -> int:
        if self.batch_size is not None:
            return self.batch_size
        return min(max(n_rows // _STEPS_AN_EPOCH, _ROWS_A_STEP[0]), _ROWS_A_STEP[1])

    def _set_scale(self, table: np.ndarray) -> None:
        table = table.astype(np.float64)
        self.mean_, self.scale_ = np.zeros(table.shape[1]), np.ones(table.shape[1])
        if self.standardise:
            observed = [column[~np.isnan(column)][:, None] for column in table.T]
            parts = [_moments(column) for column in observed] if np.isnan(table).any() else [_moments(table)]
            self.mean_, deviation = (np.concatenate(part) for part in zip(*parts, strict=True))
            # below the rounding of the mean a deviation is no deviation
            self.scale_ = np.where(deviation > 1e-12 * np.abs(self.mean_) + 1e-300, deviation, 1.0)

    def _scaled(self, table: np.ndarray) -> torch.Tensor:
        with np.errstate(over="ignore"):
            rows = (table.astype(np.float64) - self.mean_) / self.scale_
        is_lost = ~np.isfinite(rows) & np.isfinite(table)
        if is_lost.any():
            columns = np.flatnonzero(is_lost.any(0))
            got = f"infinite ones in columns {columns[:5].tolist()} ({len(columns)} in all)"
            raise DataError("rows that are finite once scaled", got, "Clip them, or give them another unit.")
        return torch.from_numpy(rows)

    def _checked(self, X: object) -> np.ndarray:  # noqa: N803
        check_is_fitted(self)
        return self._validated(X, reset=False)

    def _validated(self, X: Any, **options: Any) -> np.ndarray:  # noqa: ANN401, N803
        return np.asarray(validate_data(self, X, dtype=(np.float64, np.float32), **options))


class TableModel(Table):
    """Fitting and scoring of a Bayesian autoencoder on a table; base of two estimators, which document it."""

    def fit(self, X: object, y: object = None) -> Self:  # noqa: N803 - scikit-learn's name
        """Scale the table, train the network, put the posterior over its weights.

        Args:
            X: Rows, (N, D), N of at least 2: an array, or a frame of numbers. Finite.
            y: Ignored.

        Returns:
            The estimator itself.

        Raises:
            DataError: If an argument is out of its range, or a column too wide for floats.
            UnsupportedError: If ``likelihood`` or ``weights`` is none.
        """
        self._fit(X)
        return self

    def _fit(self, X: object) -> tuple[np.ndarray, np.ndarray]:  # noqa: N803 - scikit-learn's name
        """Fit everything; the checked table and the row numbers that were held out."""
        table = self._validated(X, ensure_min_samples=2)
        check_training(self)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._set_scale(table)
        rows = self._scaled(table)
        n_rows, n_columns = rows.shape
        kept, held_out = self._split(n_rows, seed)
        train, validation = rows[kept], rows[held_out]
        hidden, n_latents = self._sizes(n_columns)
        size = self._rows_a_step(len(train))
        likelihood = StudentT(per_output=True, floor=FLOOR) if self.likelihood is None else self.likelihood
        with random.scope(seed):
            encoder = nets.mlp(n_columns, hidden, n_latents).double()
            decoder = nets.mlp(n_latents, hidden[::-1], n_columns).double()
            self.model_ = Autoencoder(encoder, decoder, copy.deepcopy(likelihood))
            self.history_ = fit_model(
                self.model_,
                train,
                validation=validation,
                epochs=self.epochs,
                patience=self.patience,
                batch_size=size,
                learning_rate=self.learning_rate,
                progress=False,
            )
            method = Laplace("kronecker") if self.weights is None else self.weights
            self.posterior_ = fit_weights(method, self.model_, train, batch_size=size, progress=False)
        self._seed = seed
        self.n_iter_ = len(self.history_.train)
        return table, held_out

    def _contributions(self, table: np.ndarray) -> np.ndarray:
        rows = self._scaled(table)
        moments = Predictive(self.model_, self.posterior_).moments(rows, seed=self._seed)
        # a density per unit of x, not per standard deviation
        return ood.contributions(moments, rows).double().numpy() + np.log(self.scale_)

    def contributions(self, X: object) -> np.ndarray:  # noqa: N803
        r"""How strange every entry is: the parts of `anomaly_score`, column by column.

        .. math:: c_{ij} = -\log p(x_{ij} \mid \mathbb{E}[x_{ij}], \operatorname{Var}[x_{ij}]), \qquad
                  \operatorname{Var} = noise + weights

        Args:
            X: Rows, (N, D), in the units that were fitted.

        Returns:
            (N, D), nats; rows add up to `anomaly_score`. A large entry is a value that the code does not explain.

        Exact when: the noise is Gaussian and the posterior a linearised Normal. Student-t noise, the default, keeps its
            degrees of freedom and matches the variance; no draw is made either.
        Biased when: read as a cause: one strange value moves the code, and with it columns that are as usual; those
            with little noise can then show more than the strange one.
        """
        return self._contributions(self._checked(X))

    def anomaly_score(self, X: object) -> np.ndarray:  # noqa: N803
        """Minus the log predictive density of every row: **higher = stranger**, as everywhere in this library.

        Args:
            X: Rows, (N, D).

        Returns:
            (N,), nats.
        """
        return self.contributions(X).sum(1)

    def score_samples(self, X: object) -> np.ndarray:  # noqa: N803
        """Log predictive density of every row: **higher = more normal**, scikit-learn's sign.

        Args:
            X: Rows, (N, D).

        Returns:
            (N,), nats per unit of X: minus `anomaly_score`.
        """
        return -self.anomaly_score(X)

    def score(self, X: object, y: object = None) -> float:  # noqa: N803
        """Mean of `score_samples`, for model selection with a fixed ``latent_dim``.

        Args:
            X: Rows, (N, D).
            y: Ignored.

        Returns:
            Nats a row. The code has seen the row, so that a larger code scores higher: do not choose its size so.
        """
        return float(self.score_samples(X).mean())
