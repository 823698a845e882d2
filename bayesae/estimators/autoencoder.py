"""`BayesianAutoencoder`: codes of a table's rows, with the uncertainty that the weights leave."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_array, check_is_fitted
from torch import nn

from bayesae.errors import ShapeError, UnsupportedError
from bayesae.estimators.base import TableModel
from bayesae.families.base import Normal
from bayesae.models import Autoencoder

__all__ = ["BayesianAutoencoder"]


class _Codes(nn.Module):
    """x to codes; the decoder stands by, so that a posterior over both finds all its weights."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class BayesianAutoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TableModel):
    r"""A Bayesian autoencoder of a table as a scikit-learn transformer.

    ``fit`` scales the columns, trains encoder and decoder with early stopping, fits the noise of every column on
    held-out rows and puts a posterior over the weights. ``transform`` gives codes, ``inverse_transform`` rows,
    ``score_samples`` the log predictive density of rows (**higher = more normal**, scikit-learn's sign) and
    ``anomaly_score`` minus that (**higher = stranger**, the library's sign), ``contributions`` its parts by column.

    .. math:: -\log p(x) = -\sum_d \log p\big(x_d \mid f_d(x),\, \operatorname{noise}_d
              + \operatorname{Var}_\theta f_d(x)\big)

    Args:
        latent_dim: Size of the code. None: the root of the number of columns, rounded (13 for 166). A choice, no
            optimum: the score ranks rows under one model and cannot choose the size.
        hidden: Widths of the encoder's hidden layers; the decoder's are these reversed. None: one layer of four times
            the columns, between 16 and 128.
        likelihood: Of scaled columns. None: ``StudentT(per_output=True, floor=0.01)``, a noise scale for every column,
            because columns are predictable to very different degrees, with heavy tails; a scale is no finer than a
            hundredth of the column's deviation, so that a near copy does not decide alone.
        weights: Method of the weight posterior. None: ``weights.Laplace("kronecker")``, which keeps the correlations
            within a layer at the cost of a few passes.
        standardise: Whether columns are centred and divided by their standard deviation first; by 1, if it is below
            1e-12 of the mean or below 1e-300. False for a likelihood of counts or of zeros and ones.
        epochs: Passes over the rows, at most.
        batch_size: Rows a step; None: a twentieth of the rows, between 16 and 512.
        learning_rate: Of Adam.
        patience: Epochs without a better held-out objective after which training stops and goes back to the best; None
            trains all epochs and keeps the last.
        validation_fraction: Share of the rows that is held out of the training, for stopping, the noise and thresholds.
        random_state: Of the held-out rows, the initial weights and the order of rows: an int leaves every generator
            untouched, a ``RandomState`` is advanced by one number, and None advances numpy's global one, as everywhere
            in scikit-learn.

    Attributes:
        model_: The trained `Autoencoder`, on scaled columns.
        posterior_: The weight posterior.
        history_: `History` of the training.
        mean_, scale_: What columns were centred and divided by, (D,).
        n_iter_: Epochs run.
        n_features_in_, feature_names_in_: As scikit-learn has them.

    Exact when: the noise is Gaussian and the posterior a linearised Normal; Student-t noise matches the variance.
    Biased when: the density is read as that of x: the code has seen x. It ranks rows under one model; it does not
        choose ``latent_dim``.
    Cost: ``epochs`` passes at most; the posterior, one or two more; scores, a few passes a row.

    Example:
        >>> import numpy as np
        >>> rows = np.random.RandomState(0).randn(60, 4)
        >>> BayesianAutoencoder(latent_dim=2, epochs=2, random_state=0).fit(rows).transform(rows).shape
        (60, 2)
    """

    @overload
    def transform(self, X: object, return_std: Literal[False] = ...) -> np.ndarray: ...  # noqa: N803
    @overload
    def transform(self, X: object, return_std: Literal[True]) -> tuple[np.ndarray, np.ndarray]: ...  # noqa: N803
    @torch.no_grad()
    def transform(self, X: object, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:  # noqa: N803
        r"""Codes of rows, and how far the posterior over the encoder's weights spreads them.

        .. math:: z = e(x; \theta_*), \qquad \operatorname{sd}[z_k] = \sqrt{J_k \Sigma J_k^\top}

        Args:
            X: Rows, (N, D).
            return_std: Give (codes, standard deviations).

        Returns:
            Codes (N, Z) in the dtype of X, or the pair.

        Exact when: the encoder is linear in its weights, or read as linearised at the mean; 0 for `weights.MAP`.

        Raises:
            UnsupportedError: If the posterior is several networks, whose codes are not one another's.
        """
        table = self._checked(X)
        rows = self._scaled(table)
        codes = self.model_.encoder(rows).numpy().astype(table.dtype)
        if not return_std:
            return codes
        if isinstance(self.posterior_, Normal):
            _, variance = self.posterior_.output_variance(_Codes(self.model_), rows)
            return codes, variance.sqrt().numpy().astype(table.dtype)
        if self.posterior_.n_atoms == 1:
            return codes, np.zeros_like(codes)
        fix = "Use weights=bae.weights.Laplace(...), or return_std=False."
        raise UnsupportedError("a Normal posterior", type(self.posterior_).__name__, fix)

    @torch.no_grad()
    def inverse_transform(self, Z: object) -> np.ndarray:  # noqa: N803
        """Rows that codes stand for: the decoder's mean, in the units that were fitted.

        Args:
            Z: Codes, (N, Z).

        Returns:
            (N, D), of the dtype of Z.

        Raises:
            ShapeError: If codes have another size.
        """
        check_is_fitted(self)
        codes = np.asarray(check_array(Z, dtype=[np.float64, np.float32]))  # pyright: ignore[reportArgumentType]
        if codes.shape[1] != self._n_features_out:
            fix = "Give what transform returned."
            raise ShapeError(f"codes of {self._n_features_out} columns", f"{codes.shape[1]}", fix)
        outputs = self.model_.decoder(torch.from_numpy(codes.astype(np.float64)))
        rows = self.model_.likelihood.mean(outputs).numpy() * self.scale_ + self.mean_
        return rows.astype(codes.dtype)

    @property
    def _n_features_out(self) -> int:
        return next(reversed(list(self.model_.encoder.parameters()))).shape[0]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
