"""`BayesianOutlierDetector`: strange rows of a table, with a threshold that a set rate of false alarms fixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from sklearn.base import OutlierMixin

from bayesae.estimators.base import TableModel
from bayesae.estimators.checks import check_number
from bayesae.ood import ConformalCalibration
from bayesae.types import Likelihood
from bayesae.weights import WeightInference

__all__ = ["BayesianOutlierDetector"]


class BayesianOutlierDetector(OutlierMixin, TableModel):
    r"""A Bayesian autoencoder of a table as a scikit-learn outlier detector.

    Every method says its sign. scikit-learn's: ``score_samples`` and ``decision_function`` are **low for outliers**,
    the latter 0 at the threshold, and ``predict`` gives -1 for outliers and +1 for the rest. The library's and PyOD's:
    ``anomaly_score`` is **high for outliers** (what PyOD calls decision_function), ``contributions`` are its parts by
    column, ``tail_probability`` is a rank among held-out rows.

    .. math:: -\log p(x) = -\sum_d \log p\big(x_d \mid f_d(x),\, \operatorname{noise}_d
              + \operatorname{Var}_\theta f_d(x)\big)

    The threshold needs no guess of how many outliers there are. Rows that were held out of the training, taken as
    normal, fix it: a share ``false_alarm_rate`` of them lies beyond. If the table is known to be polluted,
    ``contamination`` is the share of *its own* rows that are beyond instead.

    Args:
        latent_dim: This and all others up to ``random_state`` are as of `BayesianAutoencoder`.
        false_alarm_rate: Share of held-out rows beyond the threshold, in (0, 1); 0.05 is one normal row in twenty.
            Not read if ``contamination`` is given.
        contamination: Share of outliers in the table, in (0, 0.5], as scikit-learn has it; None if it is normal.

    Attributes:
        offset_: Threshold of ``score_samples``: ``decision_function = score_samples - offset_``.
        threshold_: The same for ``anomaly_score``: minus ``offset_`` (PyOD's name).
        decision_scores_: ``anomaly_score`` of the fitted rows, (N,) (PyOD's name; higher = stranger).
        labels_: 1 for fitted rows beyond the threshold, else 0, (N,) (PyOD's name).
        held_out_scores_: ``anomaly_score`` of the rows that were held out, sorted.
        model_, posterior_, history_, mean_, scale_, n_iter_, n_features_in_, feature_names_in_: As of
            `BayesianAutoencoder`.

    Exact when: the rate of false alarms is, in expectation and up to 1 / (rows held out), for new rows from where the
        held-out ones came.
    Biased when: few rows are held out, because the noise of the columns was fitted on the same ones: alarms are then
        somewhat more frequent than asked for.
    Cost: as `BayesianAutoencoder`'s, and one scoring of the table.

    Example:
        >>> import numpy as np
        >>> rows = np.random.RandomState(0).randn(80, 3)
        >>> detector = BayesianOutlierDetector(epochs=2, random_state=0).fit(rows)
        >>> detector.predict(np.array([[0.0, 0.0, 0.0], [40.0, -40.0, 40.0]])).tolist()
        [1, -1]
    """

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
        false_alarm_rate: float = 0.05,
        contamination: float | None = None,
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
        self.false_alarm_rate = false_alarm_rate
        self.contamination = contamination

    def fit(self, X: object, y: object = None) -> Self:  # noqa: N803
        """Fit the model and the threshold.

        Args:
            X: Rows, (N, D), N of at least 2, taken as normal unless ``contamination`` says otherwise.
            y: Ignored.

        Returns:
            The estimator itself.

        Raises:
            DataError: If an argument is out of its range, or a column too wide for floats.
            UnsupportedError: If ``likelihood`` or ``weights`` is none.
        """
        if self.contamination is not None:
            fix = "None takes the threshold from held-out rows."
            check_number("contamination", self.contamination, "in (0, 0.5], or None", lambda n: 0 < n <= 0.5, fix)
        fix = "0.05 is one in twenty."
        check_number("false_alarm_rate", self.false_alarm_rate, "in (0, 1)", lambda n: 0 < n < 1, fix)
        table, held_out = self._fit(X)
        self.decision_scores_ = self._contributions(table).sum(1)
        self.held_out_scores_ = np.sort(self.decision_scores_[held_out])
        if self.contamination is None:
            self.threshold_ = float(np.quantile(self.held_out_scores_, 1 - self.false_alarm_rate))
        else:
            self.threshold_ = float(np.quantile(self.decision_scores_, 1 - self.contamination))
        self.offset_ = -self.threshold_
        self.labels_ = (self.decision_scores_ > self.threshold_).astype(int)
        return self

    def decision_function(self, X: object) -> np.ndarray:  # noqa: N803
        """How far rows are on the normal side: **negative = outlier**, 0 at the threshold.

        Args:
            X: Rows, (N, D).

        Returns:
            (N,), nats: ``score_samples(X) - offset_``.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: object) -> np.ndarray:  # noqa: N803
        """Which rows are outliers.

        Args:
            X: Rows, (N, D).

        Returns:
            (N,) of +1 (normal) and -1 (outlier).
        """
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def tail_probability(self, X: object) -> np.ndarray:  # noqa: N803
        r"""How often a normal row is as strange as these: the rank among the held-out rows.

        .. math:: p_i = \frac{1 + \#\{j : s_j \ge s_i\}}{1 + n}

        Args:
            X: Rows, (N, D).

        Returns:
            (N,), in [1 / (n + 1), 1] for n rows held out. It is no probability that a row is an outlier: that would
            need to know how outliers look and how many there are.

        Exact when: as a conformal p-value, at most uniform, for rows exchangeable with the held-out ones.
        Biased when: few rows are held out, because the noise was fitted on the same ones.

        References:
            | Testing for Outliers with Conformal p-values (Bates, Candes, Lei, Romano, Sesia, 2023)
        """
        return ConformalCalibration.fit(self.held_out_scores_).p_values(self.anomaly_score(X)).numpy()
