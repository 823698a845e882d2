"""Figures of two dimensions of a code."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import bayesae as bae

mpl.use("Agg")


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def offsets(collection):
    return torch.as_tensor(np.asarray(collection.get_offsets()))


class TestScatter:
    def test_every_label_has_its_points_and_a_line_of_the_legend(self, axes):
        locations, labels = torch.randn(9, 4), torch.tensor([7, 2, 2, 5, 7, 7, 2, 5, 5])
        assert bae.plots.latent_scatter(axes, locations, labels, dimensions=(3, 1)) is axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["2", "5", "7"]
        for points, label in zip(axes.collections, (2, 5, 7), strict=True):
            assert_close(offsets(points), locations[labels == label][:, [3, 1]].double())
        assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == 3
        assert axes.get_xlabel() == "code dimension 3" and axes.get_ylabel() == "code dimension 1"
        axes.get_figure().canvas.draw()

    @pytest.mark.parametrize("n", [10, 25])
    def test_as_many_colours_as_labels(self, axes, n):
        bae.plots.latent_scatter(axes, torch.randn(n, 2), [f"class {i:02d}" for i in range(n)])
        assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == n

    def test_without_labels_there_is_no_legend(self, axes):
        bae.plots.latent_scatter(axes, torch.randn(9, 2, requires_grad=True))
        assert axes.get_legend() is None and len(offsets(axes.collections[0])) == 9

    def test_ellipses_are_the_covariances(self, axes):
        """Their outlines are the points at that many deviations, C = sum of axes."""
        root = torch.randn(5, 3, 3, dtype=torch.float64)
        covariances, locations = root @ root.mT, torch.randn(5, 3, dtype=torch.float64)
        bae.plots.latent_scatter(axes, locations, covariances=covariances, dimensions=(2, 0), n_deviations=2.0)
        ellipses, chosen = next(c for c in axes.collections if hasattr(c, "get_angles")), [2, 0]
        assert_close(offsets(ellipses), locations[:, chosen])
        angles = np.deg2rad(ellipses.get_angles())
        for i in range(5):
            turn = np.array([[np.cos(angles[i]), -np.sin(angles[i])], [np.sin(angles[i]), np.cos(angles[i])]])
            halves = np.diag([ellipses.get_widths()[i] / 2, ellipses.get_heights()[i] / 2]) / 2.0
            assert_close(torch.as_tensor(turn @ halves**2 @ turn.T), covariances[i][chosen][:, chosen])
        axes.get_figure().canvas.draw()
        reach = 2 * covariances.diagonal(dim1=1, dim2=2).sqrt()
        for j, limits in zip(chosen, (axes.get_xlim(), axes.get_ylim()), strict=True):
            assert limits[0] <= (locations - reach)[:, j].min() and (locations + reach)[:, j].max() <= limits[1]

    def test_errors(self, axes):
        with pytest.raises(bae.errors.ShapeError, match=r"locations \(N, Z\)"):
            bae.plots.latent_scatter(axes, torch.randn(9, 1))
        with pytest.raises(bae.errors.ShapeError, match="9 labels"):
            bae.plots.latent_scatter(axes, torch.randn(9, 2), torch.zeros(8))
        with pytest.raises(bae.errors.ShapeError, match=r"covariances \(9, 2, 2\)"):
            bae.plots.latent_scatter(axes, torch.randn(9, 2), covariances=torch.eye(2))


def shown(axes, n, height, width):
    """Images of the mosaic, (row from the top, column, height, width), and the gaps between them."""
    mosaic = axes.images[0].get_array()
    assert mosaic.shape == (n * (height + 1) - 1, n * (width + 1) - 1)
    rows = [slice(i * (height + 1), i * (height + 1) + height) for i in range(n)]
    columns = [slice(j * (width + 1), j * (width + 1) + width) for j in range(n)]
    assert mosaic.mask.sum() == mosaic.size - n * n * height * width
    return [[torch.as_tensor(mosaic[row, column].data) for column in columns] for row in rows]


class TestGrid:
    def test_the_first_dimension_grows_to_the_right_and_the_second_upwards(self, axes):
        seen = []

        def decode(z):
            seen.append(z)
            return (z[:, :1] + 10 * z[:, 1:]).expand(-1, 6) + torch.arange(6)

        assert bae.plots.latent_grid(axes, decode, n=3, shape=(2, 3), high=1.0) is axes
        quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([1, 3, 5]) / 6)
        for i, row in enumerate(shown(axes, 3, 2, 3)):
            for j, image in enumerate(row):
                expected = quantiles[j] + 10 * quantiles[2 - i] + torch.arange(6.0).reshape(2, 3)
                assert_close(image, expected.double(), rtol=0, atol=1e-5)
        assert seen[0].dtype == torch.float32 and axes.images[0].get_clim() == (0, 1)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["-1.0", "0.0", "1.0"]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["-1.0", "0.0", "1.0"]
        assert list(axes.get_xticks()) == [1, 5, 9] and list(axes.get_yticks()) == [6.5, 3.5, 0.5]
        axes.get_figure().canvas.draw()

    @pytest.mark.parametrize("draws", [(), (1,), (2,)])
    def test_pictures_and_weight_draws(self, axes, draws):
        """(n^2, 1, height, width), and the mean of several of them, as Predictive.decoder gives."""
        pictures = torch.rand(*draws, 16, 1, 2, 3)
        bae.plots.latent_grid(axes, lambda z: pictures, n=4)
        mean = pictures.mean(0) if draws else pictures
        for i, row in enumerate(shown(axes, 4, 2, 3)):
            for j, image in enumerate(row):
                assert_close(image, mean[4 * i + j, 0].double())

    def test_a_predictive_decodes(self, axes, model):
        leaves = bae.functional.stack_draws([bae.functional.parameters_of(model.network)] * 2)
        decode = bae.Predictive(model, bae.families.Particles(leaves)).decoder()
        bae.plots.latent_grid(axes, decode, n=3, shape=(1, 7), like=model.reference)
        assert len(shown(axes, 3, 1, 7)) == 3

    def test_labels_do_not_crowd(self, axes):
        bae.plots.latent_grid(axes, lambda z: torch.zeros(len(z), 2, 2), n=20)
        assert len(axes.get_xticks()) == 7

    @pytest.mark.parametrize("wrong", [(9, 2, 3, 3), (8, 3, 3), (9, 7)])
    def test_errors(self, axes, wrong):
        with pytest.raises(bae.errors.ShapeError, match="9 images of"):
            bae.plots.latent_grid(axes, lambda z: torch.zeros(wrong), n=3, shape=(3, 3))
