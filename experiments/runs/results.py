"""The results of a run: its table, the mean correlations and the report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]

from repsim_kernels import experiments
from repsim_kernels.experiments.errors import ReportError


@dataclass(frozen=True, eq=False)
class Results:
    """The results of a run, as `Study.run` and `repsim_kernels.experiments.run` return them.

    Attributes
    ----------
    table : DataFrame
        One row per model, class, layer and cell; for the columns see
        ``repsim_kernels.experiments.run``.
    folder : Path or None
        The run's folder, if it is stored.
    """

    table: pd.DataFrame
    folder: Path | None = None

    def __repr__(self) -> str:
        """Summarise the results in one line."""
        counts = ", ".join(
            f"{name}={self.table[column].nunique()}"
            for name, column in (("models", "model"), ("layers", "layer"), ("classes", "class"))
        )
        folder = "" if self.folder is None else f", folder={str(self.folder)!r}"
        return f"Results({counts}, rows={len(self.table)}{folder})"

    def summary(self) -> pd.DataFrame:
        """Average the rank correlations of distances with function changes, as `repsim` prints.

        Returns
        -------
        DataFrame
            Mean Spearman correlation over layers and classes: a row per model and distance, a
            column per function change; NaN where no layer and class has a correlation.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> from repsim_kernels.experiments import Study
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> images, labels = torch.randn(20, 3, 2, 2), torch.arange(2).repeat(10)
        >>> results = Study(model, ["2"], images, labels, metrics=["cka"]).run()
        >>> results
        Results(models=1, layers=1, classes=2, rows=32)
        >>> results.summary().index.to_list()
        [('Sequential', 'cka'), ('Sequential', 'energy')]
        """
        from repsim_kernels.experiments.analysis.correlations import (
            change_columns,
            compute_correlations,
            distance_columns,
            tabulate_means,
        )

        sides = distance_columns(self.table), change_columns(self.table)
        return tabulate_means(compute_correlations(self.table, *sides))

    def report(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the HTML report.

        Parameters
        ----------
        path : path, optional
            The file; by default ``report.html`` in the run's folder.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        ReportError
            The file can't be written, or the run has no folder and `path` is missing.
        StoreError
            The run's folder is no longer readable.

        Notes
        -----
        Without a folder the report lacks what only ``study.json`` records, such as the accuracy.
        """
        if self.folder is not None:
            return experiments.write_report(
                self.folder, self.folder / "report.html" if path is None else path
            )
        if path is None:
            raise ReportError("path: None for a run without a folder; expected an .html file")
        return experiments.write_report(self.table, path)
