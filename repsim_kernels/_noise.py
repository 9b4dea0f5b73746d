"""The noise of neurons, by which distances between stimuli are normalised."""

from __future__ import annotations

from typing import Any, NamedTuple


class Noise(NamedTuple):
    """A covariance of the noise of p neurons, or what it is estimated from.

    Exactly one of the first three is set. They are float64 tensors, or NumPy arrays for the
    reference. Leading dimensions are those of a batch of sets of neurons.

    Attributes
    ----------
    covariance : (…, p, p), optional
    residuals : (…, m, p), optional
        Centred; their covariance is shrunk as Ledoit & Wolf 2004 do.
    variances : (…, p), optional
        The diagonal of the covariance, the rest of which is ignored.
    scale : float
        Multiplies the covariance of the residuals: m divided by their degrees of freedom.
    """

    covariance: Any = None
    residuals: Any = None
    variances: Any = None
    scale: float = 1.0

    def select(self, neurons: Any) -> Noise:
        """Return the noise of B sets of k neurons (B, k), with a leading dimension B."""
        if self.variances is not None:
            return self._replace(variances=self.variances[neurons])
        if self.residuals is not None:
            return self._replace(residuals=self.residuals.mT[neurons].mT)
        rows, columns = neurons[:, :, None], neurons[:, None, :]
        return self._replace(covariance=self.covariance[rows, columns])
