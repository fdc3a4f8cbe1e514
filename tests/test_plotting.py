"""The figure: six panels with the paper's numbers, gaps where nothing was measured, zero error marked."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from ncfast.history import zero_error_epochs
from ncfast.plotting import plot_history

FIELDS = (
    ("nc2_equinorm_means", "nc2_equinorm_classifier"),
    ("nc2_equiangular_means", "nc2_equiangular_classifier"),
    ("nc2_max_angle_means", "nc2_max_angle_classifier"),
    ("nc3_self_duality",),
    ("nc1",),
    ("nc4_disagreement",),
)


def records(accuracies, missing=()):
    names = [name for panel in FIELDS for name in panel]
    return [
        {"epoch": epoch, "train_accuracy": accuracy}
        | {name: None if name in missing else (i + 1) / epoch for i, name in enumerate(names)}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


def curves(axes):
    return [line for line in axes.lines if line.get_linestyle() not in ("--", ":")]


def marks(axes, style="--"):
    return [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == style]


def test_every_panel_shows_its_numbers_and_the_mark():
    history = records([0.5, 0.9, 1.0, 0.99, 1.0])
    figure = plot_history(history, title="run")
    assert len(figure.axes) == 6
    for axes, names in zip(figure.axes, FIELDS, strict=True):
        drawn = [list(line.get_ydata()) for line in curves(axes)]
        assert drawn == [[record[name] for record in history] for name in names]
        assert marks(axes) == [3]
        assert marks(axes, ":") == [5]
        assert axes.get_ylabel()
    assert [axes.get_title(loc="left")[:6] for axes in figure.axes] == [f"Fig. {n}" for n in range(2, 8)]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear"] * 4 + ["log", "symlog"]
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    zero_error = ["zero training error (epoch 3)", "zero for good (epoch 5)"]
    assert texts == ["class means", "classifier", *zero_error]


@pytest.mark.parametrize(
    "accuracies", [[0.5, 1.0, 1.0], [0.5, 1.0, 0.9]]
)  # it lasts at once; it does not last
def test_one_mark_is_enough(accuracies):
    figure = plot_history(records(accuracies))
    assert all(marks(axes) == [2] and marks(axes, ":") == [] for axes in figure.axes)
    assert len(figure.legends[0].get_texts()) == 3


def test_no_disagreement_is_shown_as_zero():
    history = records([0.5, 1.0, 1.0])
    history[1]["nc4_disagreement"] = 0.0
    axes = plot_history(history).axes[5]
    bottom = axes.transAxes.transform((0, 0))[1]
    shown = [axes.transData.transform((r["epoch"], r["nc4_disagreement"]))[1] - bottom for r in history]
    assert shown[1] == pytest.approx(0)
    assert min(shown[0], shown[2]) > 10  # pixels above the axis
    history = [record | {"nc4_disagreement": 0.0} for record in history]
    assert plot_history(history).axes[5].get_ylim()[0] == 0


def test_no_zero_error_no_mark():
    figure = plot_history(records([0.5, None, 0.9]))
    assert all(marks(axes) == [] for axes in figure.axes)
    assert len(figure.legends[0].get_texts()) == 2


def test_gaps():
    figure = plot_history(records([0.5, 1.0], missing={"nc4_disagreement"}))
    (line,) = curves(figure.axes[5])
    assert all(math.isnan(value) for value in line.get_ydata())


def test_saved_picture_is_not_blank(tmp_path):
    plot_history(records([1.0]), tmp_path / "one.png")  # a single epoch is a point
    picture = imread(tmp_path / "one.png")
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


@pytest.mark.parametrize(
    ("accuracies", "first", "lasting"),
    [
        ([0.5, 1.0, 1.0], 2, 2),
        ([0.5, 1.0, 0.9, 1.0], 2, 4),  # the error returns once
        ([1.0, 0.9], 1, None),
        ([0.5, 0.9], None, None),
        ([1.0], 1, 1),
        ([0.5, 1.0, None, 1.0], 2, 2),  # an epoch that was not measured
        ([None, None], None, None),
    ],
)
def test_first_and_lasting_zero_error(accuracies, first, lasting):
    assert zero_error_epochs(records(accuracies)) == (first, lasting)


def test_nothing_to_plot():
    with pytest.raises(ValueError, match="no records"):
        plot_history([])
