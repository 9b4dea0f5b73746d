"""The result of a comparison: a value for each pair of layers."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repsim_kernels import _arrays, _options
from repsim_kernels._files import find_write_obstacle, replace_file
from repsim_kernels._metrics import METRICS
from repsim_kernels._typing import Array
from repsim_kernels.errors import NonFiniteError, OptionError, ShapeError

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]
    from matplotlib.axes import Axes

_METRICS = {metric.name: metric for metric in METRICS if metric.pairwise}
_PICTURES = (".png", ".pdf", ".svg")
_SUFFIXES = (*_PICTURES, ".csv", ".parquet", ".html")
_DPI = 200


@dataclass(frozen=True, eq=False)
class SimilarityMap:
    """A metric between the layers of two networks, or of one network.

    Parameters
    ----------
    values : array, (R, C)
        The metric for each pair of a row and a column; NaN where it is not defined.
    rows, columns : sequence of R or C str
        Names of the layers, in order, each once.
    metric : str
        Name of the metric, such as "cka".
    options : mapping
        The options that the metric was computed with.
    n : int
        Number of stimuli that the values come from.
    standard_error : array, (R, C), optional
        Standard error of each value; NaN where it is not known.
    n_left_out : int
        Number of stimuli that did not contribute.
    threshold : float, optional
        What a similarity must exceed to be beyond chance, as from ``compare(…, calibrate=…)``.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, OptionError

    Notes
    -----
    All arrays are copied, to NumPy float64, and can't be written to.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> m = rk.SimilarityMap(
    ...     [[0.9, 0.2], [0.3, 0.8]], ["conv1", "conv2"], ["block1", "block2"], "cka", {}, 100
    ... )
    >>> m
    SimilarityMap: CKA of 2 x 2 layers, 0.2 … 0.9, n = 100
    >>> m.to_frame()
           block1  block2
    conv1     0.9     0.2
    conv2     0.3     0.8
    """

    values: Array
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    metric: str
    options: Mapping[str, Any]
    n: int
    standard_error: Array | None = None
    n_left_out: int = 0
    threshold: float | None = None

    def __post_init__(self) -> None:
        values = _check_values(self.values, "values")
        checked: dict[str, Any] = {
            "values": values,
            "rows": check_names(self.rows, "rows", values.shape[0]),
            "columns": check_names(self.columns, "columns", values.shape[1]),
            "metric": _options.check_choice(self.metric, "metric", _METRICS),
            "options": _check_options(self.options),
            "n": _options.check_count(self.n, "n"),
            "n_left_out": _options.check_count(self.n_left_out, "n_left_out", 0),
        }
        if self.standard_error is not None:
            error = _check_values(self.standard_error, "standard_error")
            if error.shape != values.shape:
                raise ShapeError(
                    f"standard_error: shape {error.shape}; expected {values.shape}, like values"
                )
            if (error < 0).any():
                raise OptionError(
                    f"standard_error: {np.nanmin(error):g}; expected no negative number"
                )
            checked["standard_error"] = error
        if self.threshold is not None:
            if self.is_distance:
                raise OptionError(
                    f"threshold: given with {self.metric!r}; expected one for similarities only"
                )
            checked["threshold"] = _options.check_number(
                self.threshold, "threshold", low=-1, high=1
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"SimilarityMap: {self.describe()}"

    @property
    def label(self) -> str:
        """Name of the metric in tables and figures."""
        debiased = self.metric == "cka" and self.options.get("debiased") is True
        return _METRICS["cka_debiased" if debiased else self.metric].label

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value that the metric takes with its default options."""
        return _METRICS[self.metric].bounds

    @property
    def is_distance(self) -> bool:
        """Whether small values mean alike."""
        return _METRICS[self.metric].kind == "distance"

    @property
    def has_equal_names(self) -> bool:
        """Whether rows and columns have the same names, as those of one architecture have."""
        return self.rows == self.columns

    @property
    def is_above_threshold(self) -> np.ndarray[Any, Any]:
        """Whether each value exceeds the threshold, (R, C); False for NaN and without threshold."""
        return self.values > (np.inf if self.threshold is None else self.threshold)

    def describe(self) -> str:
        """Return the metric, sizes, range and number of stimuli, on one line."""
        n_rows, n_columns = self.values.shape
        parts = [f"{self.label} of {n_rows} x {n_columns} layers"]
        undefined = int(np.isnan(self.values).sum())
        if undefined < self.values.size:
            parts.append(f"{np.nanmin(self.values):.3g} … {np.nanmax(self.values):.3g}")
        parts.append(f"n = {self.n}")
        if self.n_left_out:
            parts.append(f"{self.n_left_out} stimuli left out")
        if undefined:
            parts.append(f"{undefined} not defined")
        if self.threshold is not None:
            pairs = ~np.isnan(self.values)
            if self.has_equal_names and np.array_equal(self.values, self.values.T, equal_nan=True):
                pairs = np.triu(pairs, 1)  # of one network: each pair of layers once
            count = f"{(pairs & ~self.is_above_threshold).sum():,} of {pairs.sum():,} pairs"
            parts.append(f"{count} not above the threshold {self.threshold:.3g}")
        return ", ".join(parts)

    def warn_of_undefined(self) -> None:
        """Warn if layers have no value with any other, and name them."""
        is_undefined = np.isnan(self.values)
        names = np.array(self.rows)[is_undefined.all(1)].tolist()
        names += np.array(self.columns)[is_undefined.all(0)].tolist()
        if names:
            text = ", ".join(map(_options.short_repr, dict.fromkeys(names)))
            warnings.warn(
                f"no value for layers {_options.to_one_line(text, 1000)}: some of their values are "
                "NaN, infinite or too large, or they are the same, or equally far apart, for all "
                "stimuli",
                stacklevel=_options.find_stacklevel(),
            )

    def plot(
        self,
        ax: Axes | None = None,
        *,
        limits: tuple[float, float] | None = None,
        cmap: Any = None,
    ) -> Axes:
        """Draw the map with matplotlib; no display is needed.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default in a new figure, ``ax.figure``, in which cells are square.
        limits : (float, float), optional
            Values of the first and last colour; by default the range of the values, rounded
            outwards. Pass the same limits to maps that will be compared.
        cmap : str or matplotlib.colors.Colormap, optional
            By default "viridis", whose steps look alike, also to colour-blind readers; reversed
            for distances, so that light means alike.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        OptionError
        ModuleNotFoundError
            The extra `plot` is not installed.

        Notes
        -----
        The first layers are at the lower left. Where there are too many layers for all their
        names, every k-th has a tick. Cells without a value are hatched, those that are not above
        the threshold have a dot, and the diagonal is outlined if rows and columns have the same
        names.

        Examples
        --------
        >>> import repsim_kernels as rk
        >>> names = ["conv", "linear"]
        >>> m = rk.SimilarityMap([[1.0, 0.2], [0.2, 1.0]], names, names, "cka", {}, 100)
        >>> ax = m.plot(limits=(0, 1))
        >>> ax.figure.savefig("map.png")  # doctest: +SKIP
        """
        with _name_missing_extra():
            from repsim_kernels.comparison import picture

        return picture.draw(self, ax, limits, cmap)

    def to_frame(self) -> pd.DataFrame:
        """Return the values as a pandas table, with the names as its index and columns.

        Returns
        -------
        pandas.DataFrame
            Its ``attrs`` hold the metric, the options, the numbers of stimuli and the threshold.

        Raises
        ------
        ModuleNotFoundError
            The extra `plot` is not installed.
        """
        with _name_missing_extra():
            import pandas as pd

        frame = pd.DataFrame(self.values.copy(), index=self.rows, columns=self.columns)
        frame.attrs = self.get_origin()
        return frame

    def get_origin(self) -> dict[str, Any]:
        """Return what the values are and the threshold, if there is one, as JSON can hold it."""
        origin = {
            "metric": self.metric,
            "options": self.options,
            "n": self.n,
            "n_left_out": self.n_left_out,
        }
        if self.threshold is not None:
            origin["threshold"] = self.threshold
        return json.loads(json.dumps(origin, default=str))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a picture, a table or a page, by the suffix of the path.

        Parameters
        ----------
        path : path
            ".png", ".pdf" and ".svg" are what `plot` draws, with the metric, its options and the
            numbers of stimuli as metadata. ".html" is one self-contained page
            that shows the value and standard error of each cell under the pointer, and the metric
            with its options. ".csv" and ".parquet" are the table of `to_frame` in full precision,
            without standard errors: Parquet keeps the table's ``attrs``, and CSV nothing but
            values and names. An earlier file is replaced once the new one is complete.

        Returns
        -------
        Path
            ``path``.

        Raises
        ------
        OptionError
            The suffix is not one of these, or the folder does not exist.
        ModuleNotFoundError
            The extra `plot` is not installed; ".html" does not need it. ".parquet" also needs
            pyarrow.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> import repsim_kernels as rk
        >>> names = ["conv", "linear"]
        >>> m = rk.SimilarityMap([[1.0, 0.2], [0.2, 1.0]], names, names, "cka", {}, 100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(m.save(Path(folder) / "map.csv").read_text())
        ,conv,linear
        conv,1.0,0.2
        linear,0.2,1.0
        <BLANKLINE>
        """
        path = check_path(path)
        suffix = path.suffix.lower()
        with replace_file(path) as temporary:
            if suffix in _PICTURES:
                figure: Any = self.plot().figure
                details = "Subject" if suffix == ".pdf" else "Description"
                metadata = {"Title": self.describe(), details: json.dumps(self.get_origin())}
                figure.savefig(
                    temporary, format=suffix[1:], dpi=_DPI, bbox_inches="tight", metadata=metadata
                )
            elif suffix == ".csv":
                self.to_frame().to_csv(temporary)
            elif suffix == ".parquet":
                with _name_missing_extra():
                    import pyarrow  # type: ignore[import-untyped]  # noqa: F401
                self.to_frame().to_parquet(temporary, engine="pyarrow")
            else:
                from repsim_kernels.comparison import page

                temporary.write_text(page.render(self), encoding="utf-8")
        return path


def check_names(names: Any, argument: str, count: int | None = None) -> tuple[str, ...]:
    """Check the names of layers, `count` of them if known: strings, each once."""
    items = _options.to_tuple(names)
    if items is None or isinstance(names, (str, Mapping)):
        raise OptionError(f"{argument}: {_options.short_repr(names)}; expected a sequence of names")
    for item in items:
        if not isinstance(item, str):
            raise OptionError(
                f"{argument}: {_options.short_repr(item)} is no name; expected strings"
            )
    if count is not None and len(items) != count:
        raise ShapeError(f"{argument}: {len(items)} names; expected {count}, one for each layer")
    if repeated := [name for name in set(items) if items.count(name) > 1]:
        raise OptionError(
            f"{argument}: {_options.short_repr(min(repeated))} is repeated; expected each name once"
        )
    return tuple(map(str, items))


def _check_values(a: Any, name: str) -> np.ndarray[Any, Any]:
    """Return a matrix, in which numbers may be NaN, as a NumPy array that can't be written to."""
    tensor, _ = _arrays.convert(a, name)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ShapeError(
            f"{name}: shape {tuple(tensor.shape)}; expected (R, C): rows x columns, none empty"
        )
    values = np.array(_arrays.to_numpy(tensor.double()))
    if np.isinf(values).any():
        raise NonFiniteError(f"{name}: infinite values; expected finite numbers or NaN")
    values.flags.writeable = False
    return values


def _check_options(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise OptionError(
            f"options: {_options.short_repr(options)}; expected a mapping of names to values"
        )
    return dict(options)


def check_path(value: Any) -> Path:
    try:
        path = Path(value)
    except TypeError:
        raise OptionError(f"path: {_options.short_repr(value)}; expected a path") from None
    if path.suffix.lower() not in _SUFFIXES:
        raise OptionError(
            f"path: {_options.short_repr(str(path))}; expected a name that ends in one of "
            f"{', '.join(_SUFFIXES)}"
        )
    if why := find_write_obstacle(path):
        raise OptionError(f"path: {why}")
    return path


@contextlib.contextmanager
def _name_missing_extra() -> Iterator[None]:
    """Say how to install a package that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        how = {
            "matplotlib": "pip install 'repsim-kernels[plot]'",
            "pandas": "pip install 'repsim-kernels[plot]'",
            "pyarrow": "pip install pyarrow",
        }.get(str(error.name).partition(".")[0])
        if how is None:
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed; run: {how}", name=error.name
        ) from None
