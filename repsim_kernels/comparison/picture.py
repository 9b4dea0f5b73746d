"""The picture of a similarity map, drawn by matplotlib."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from repsim_kernels import _options
from repsim_kernels.comparison import display
from repsim_kernels.comparison.similarity_map import SimilarityMap
from repsim_kernels.errors import OptionError

_FONT = 7.0  # points
_PITCH = 1.2 * _FONT / 72  # inches from one label to the next
_CHARACTER = 0.55 * _FONT / 72  # mean width in inches
# A cell with a label of its own, the largest cell, and the shortest and longest side of a map.
_CELL, _MAX_CELL, _MIN_SIDE, _MAX_SIDE = 0.14, 0.5, 1.6, 7.5
_MISSING, _HATCH = "#d9d9d9", "//////"
_MIN_DOT, _MAX_DOT = 0.8, 2.5  # points
_LUMINANCE = 0.21, 0.72, 0.07  # shares of red, green and blue
_BRIGHT = 0.4  # a dot is black on colours brighter than this


def draw(m: SimilarityMap, ax: Axes | None, limits: tuple[float, float] | None, cmap: Any) -> Axes:
    """Draw a map; `SimilarityMap.plot` documents the arguments."""
    low, high = display.find_limits(m) if limits is None else _check_limits(limits)
    colours = _get_colours(cmap, m.is_distance)
    if ax is None:
        ax = _make_axes(m)
    elif not isinstance(ax, Axes):
        raise OptionError(f"ax: {_options.short_repr(ax)}; expected matplotlib axes")
    square = m.values.shape[0] == m.values.shape[1]
    image = ax.imshow(
        np.ma.masked_invalid(m.values),
        cmap=colours,
        vmin=low,
        vmax=high,
        origin="lower",
        aspect="equal" if square else "auto",
        interpolation="nearest",
    )
    marks = [*_mark_missing(ax, m), *_mark_not_above(ax, image, m)]
    if marks:
        ax.legend(
            handles=marks,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderaxespad=0.2,
            frameon=False,
            fontsize=_FONT,
        )
    if m.has_equal_names:
        _outline_diagonal(ax, len(m.rows))
    _set_ticks(ax, m)
    _add_bar(ax, image, m)
    return ax


def _check_limits(limits: Any) -> tuple[float, float]:
    pair = _options.to_tuple(limits) or ()
    numbers = all(isinstance(v, (int, float, np.number)) and math.isfinite(v) for v in pair)
    if isinstance(limits, str) or len(pair) != 2 or not numbers or pair[0] >= pair[1]:
        raise OptionError(
            f"limits: {_options.short_repr(limits)}; expected two finite numbers, the lower first"
        )
    return float(pair[0]), float(pair[1])


def _get_colours(cmap: Any, is_distance: bool) -> mpl.colors.Colormap:
    if cmap is None:
        cmap = "viridis_r" if is_distance else "viridis"
    try:
        return mpl.colormaps.get_cmap(cmap)
    except (TypeError, ValueError):
        raise OptionError(
            f"cmap: {_options.short_repr(cmap)}; expected a colour map of matplotlib, or its name"
        ) from None


def _make_axes(m: SimilarityMap) -> Axes:
    """Make a figure in which cells are square, unless there are few rows or columns."""
    n_rows, n_columns = m.values.shape
    most = max(n_rows, n_columns)
    cell = min(_MAX_CELL, max(3 / most, min(_CELL, _MAX_SIDE / most)))
    width, height = (max(_MIN_SIDE, cell * count) for count in (n_columns, n_rows))
    label, name = (
        _CHARACTER * max(map(len, display.shorten_names(names)[0])) for names in (m.rows, m.columns)
    )
    figure = Figure(figsize=(width + label + 1.1, height + name + 0.5), layout="constrained")
    return figure.add_subplot()


def _mark_missing(ax: Axes, m: SimilarityMap) -> list[Artist]:
    """Hatch the background, which shows where there is no value; return the legend's entry."""
    if not np.isnan(m.values).any():
        return []
    style: dict[str, Any] = {"facecolor": _MISSING, "edgecolor": "#808080", "hatch": _HATCH}
    ax.patch.set(linewidth=0, **style)
    return [Patch(label="not defined", **style)]


def _mark_not_above(ax: Axes, image: AxesImage, m: SimilarityMap) -> list[Artist]:
    """Put dots on cells that are not above the threshold; return the legend's entry."""
    if m.threshold is None:
        return []
    rows, columns = np.nonzero(~m.is_above_threshold & ~np.isnan(m.values))
    brightness = image.to_rgba(m.values[rows, columns])[:, :3] @ _LUMINANCE
    figure: Any = ax.get_figure()
    box = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    cell = 72 * min(box.width / m.values.shape[1], box.height / m.values.shape[0])
    size = min(max(0.3 * cell, _MIN_DOT), _MAX_DOT)
    ax.scatter(
        columns,
        rows,
        s=size**2,
        c=np.where(brightness > _BRIGHT, "black", "white"),
        linewidths=0,
    )
    style: dict[str, Any] = {"marker": "o", "markersize": _MAX_DOT, "linestyle": "none"}
    return [Line2D([], [], color="black", label=display.describe_threshold(m), **style)]


def _outline_diagonal(ax: Axes, count: int) -> None:
    """Outline the cells of a layer with itself."""
    cells = [Rectangle((i - 0.5, i - 0.5), 1, 1) for i in range(count)]
    width = min(1.0, 0.1 + 12 / count)
    ax.add_collection(
        PatchCollection(cells, facecolor="none", edgecolor="black", linewidth=width),
        autolim=False,
    )


def _set_ticks(ax: Axes, m: SimilarityMap) -> None:
    """Label the layers, as many as there is room for at even steps."""
    figure: Any = ax.get_figure()
    box = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    for axis, names, length in ((ax.xaxis, m.columns, box.width), (ax.yaxis, m.rows, box.height)):
        short, shared = display.shorten_names(names)
        step = math.ceil(len(names) * _PITCH / length)
        # A name may have dollar signs.
        text: dict[str, Any] = {"fontsize": _FONT, "parse_math": False}
        axis.set_ticks(range(0, len(names), step), short[::step], **text)
        axis.set_tick_params(length=2, width=0.5)
        axis.set_label_text(shared, **text)
        if axis is ax.xaxis and max(map(len, short)) * _CHARACTER > step * length / len(names):
            axis.set_tick_params(rotation=90)
    ax.spines[:].set_linewidth(0.5)


def _add_bar(ax: Axes, image: AxesImage, m: SimilarityMap) -> None:
    """Add a colour bar that is as high as the map, with the metric and number of stimuli."""
    figure: Any = ax.get_figure()
    box = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    inset = ax.inset_axes((1 + 0.1 / box.width, 0, 0.13 / box.width, 1))
    bar = figure.colorbar(image, cax=inset)
    bar.set_label(f"{m.label}, n = {m.n}", fontsize=_FONT + 1)
    bar.ax.tick_params(labelsize=_FONT, length=2, width=0.5)
    bar.outline.set_linewidth(0.5)
