"""The errors that this package raises on purpose."""

from __future__ import annotations


class RepsimError(Exception):
    """Base of every error that this package raises on purpose."""


class ShapeError(RepsimError, ValueError):
    """An array has the wrong number of dimensions, or sizes that do not fit each other."""


class DtypeError(RepsimError, TypeError):
    """An argument isn't a dense array of real numbers (complex, text, sparse), or requires grad."""


class NonFiniteError(RepsimError, ValueError):
    """An array holds NaN or infinity, or values whose Gram overflows float64."""


class ConstantError(RepsimError, ValueError):
    """A representation is the same for every stimulus, so it has no similarity to anything."""


class CellError(RepsimError, ValueError):
    """Cells of neurons are out of range, or have the wrong length."""


class LabelError(RepsimError, ValueError):
    """Class labels are out of range, name an empty class, or lack the target."""


class OptionError(RepsimError, ValueError):
    """An option has a value that the operation does not know."""


class DeviceError(RepsimError, ValueError):
    """Arrays of one call live in different libraries or on different devices."""


class LayerError(RepsimError, ValueError):
    """A layer is missing from the model, or its output can't be cut there."""


class ConvergenceError(RepsimError, ArithmeticError):
    """A decomposition did not converge, or a ridge is too small for one to exist in float64."""


class BackendUnavailable(RepsimError, RuntimeError):
    """A backend was named that can't serve this call; the message says why."""


class DegenerateWarning(UserWarning):
    """A metric is asked for where it has the same value whatever the representations hold."""


class OutOfMemoryWarning(UserWarning):
    """A device ran out of memory, and the work goes on in smaller parts."""
