"""The paper's Figs. 2–7 over the epochs of a run (needs matplotlib)."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ncfast.history import zero_error_epochs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange as in the paper, told apart by every colour vision (Okabe & Ito 2008).
_MEANS, _CLASSIFIER, _BOTH, _MARK = "#0072B2", "#E69F00", "#222222", "#777777"


class _Panel(NamedTuple):
    title: str
    label: str
    lines: tuple[tuple[str, str], ...]
    """(field, colour) each."""
    log: bool = False
    counts: bool = False
    """A share of the samples, from most of them to a few and to none."""


def _pair(field: str) -> tuple[tuple[str, str], ...]:
    return (f"{field}_means", _MEANS), (f"{field}_classifier", _CLASSIFIER)


_PANELS = (
    _Panel("Fig. 2 (NC2): equal norms", "Std/Avg of the norms", _pair("nc2_equinorm")),
    _Panel("Fig. 3 (NC2): equal angles", "Std of the cosines", _pair("nc2_equiangular")),
    _Panel("Fig. 4 (NC2): maximal angles", "Avg |cos + 1/(C − 1)|", _pair("nc2_max_angle")),
    _Panel(
        "Fig. 5 (NC3): self-duality",
        r"$\Vert \tilde{W}^{\,T} - \tilde{M} \,\Vert_F^{\,2}$",
        (("nc3_self_duality", _BOTH),),
    ),
    _Panel(
        "Fig. 6 (NC1): variability collapse",
        r"$\mathrm{Tr}(\Sigma_W \Sigma_B^\dagger)\,/\,C$",
        (("nc1", _BOTH),),
        log=True,
    ),
    _Panel(
        "Fig. 7 (NC4): nearest class centre",
        "disagreement with NCC",
        (("nc4_disagreement", _BOTH),),
        counts=True,
    ),
)


def plot_history(
    records: Sequence[Mapping[str, Any]], path: str | os.PathLike[str] | None = None, title: str | None = None
) -> "Figure":
    """Draw Figs. 2–7 of Papyan, Han & Donoho (PNAS 2020) as six panels over the epochs.

    Class means are blue, the classifier orange. In every panel a dashed line marks the first epoch of zero
    training error, and a dotted one the epoch from which it stays zero, where that is another. Numbers that
    were not measured leave gaps. The axis of Fig. 6 is logarithmic, as in the paper; that of Fig. 7 too, but
    down to the smallest share measured, and from there linear to zero.

    Args:
        records: one mapping per epoch with `epoch` and the fields of `CollapseReport`, in order.
        path: where to save the figure, in the format that its ending says; None does not.
        title: above the panels.

    Returns:
        A matplotlib Figure of its own, unknown to pyplot.

    Raises:
        ImportError: matplotlib is not installed. ValueError: there are no records.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plotting needs matplotlib (pip install matplotlib)")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not records:
        raise ValueError("there are no records to plot")
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    first, lasting = zero_error_epochs(records)
    marks = {"--": (first, "zero training error")}
    if lasting != first:
        marks[":"] = (lasting, "zero for good")
    handles = [
        Line2D([], [], color=_MEANS, linewidth=2, label="class means"),
        Line2D([], [], color=_CLASSIFIER, linewidth=2, label="classifier"),
    ]
    panels = figure.subplots(2, 3, sharex=True)
    for panel, axes in zip(_PANELS, panels.flat, strict=True):
        _draw(panel, axes, records)
    for style, (epoch, label) in marks.items():
        if epoch is not None:
            look = {"color": _MARK, "linestyle": style, "linewidth": 1.2, "label": f"{label} (epoch {epoch})"}
            handles += [axes.axvline(epoch, zorder=1, **look) for axes in panels.flat][:1]
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    figure.align_ylabels()
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    if title is not None:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw(panel: _Panel, axes: "Axes", records: Sequence[Mapping[str, Any]]) -> None:
    epochs = [record["epoch"] for record in records]
    # A single epoch is no line; nor are shares that jump between no sample and one.
    points = panel.counts or len(epochs) == 1
    for name, color in panel.lines:
        values = [math.nan if record[name] is None else record[name] for record in records]
        (line,) = axes.plot(epochs, values, color=color, linewidth=2, clip_on=False, zorder=2.5)
        if points:
            line.set(linestyle="", marker=".")
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_ylabel(panel.label)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.log:
        axes.set_yscale("log")
        return
    if panel.counts:
        shares = [record[name] for name, _ in panel.lines for record in records if record[name]]
        axes.set_yscale("symlog", linthresh=min(shares, default=1.0))
    axes.set_ylim(bottom=0)
