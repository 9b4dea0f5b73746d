"""The errors and warnings that this package raises."""

from __future__ import annotations


class RepsimError(Exception):
    """Base class of every error that this package raises on purpose.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> try:
    ...     rk.cka([[1.0], [2.0]], [[1.0], [2.0], [3.0]])
    ... except rk.RepsimError as error:
    ...     print(error)
    y: 3 stimuli, but x has 2; expected the same stimuli in the same order
    """


class ShapeError(RepsimError, ValueError):
    """An array has the wrong number of dimensions, or its shape does not match another's.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.centered_gram([1.0, 2.0])
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.ShapeError: x: shape (2,); expected (n, p): stimuli x neurons
    """


class DtypeError(RepsimError, TypeError):
    """An argument is not a dense array of real numbers, or it requires gradients.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.centered_gram([[1j], [2.0]])
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.DtypeError: x: dtype complex128; expected real numbers (float16, ...)
    """


class NonFiniteError(RepsimError, ValueError):
    """An array contains NaN or infinity, or values whose Gram matrix would overflow float64.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.centered_gram([[1.0], [float("nan")]])
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.NonFiniteError: x: 1 of 2 values are NaN or infinite (the first at ...
    """


class ConstantError(RepsimError, ValueError):
    """A representation is the same for every stimulus, so that its similarity is not defined.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.cka([[1.0], [1.0]], [[1.0], [2.0]])
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.ConstantError: x: the representation is the same for every stimulus; ...
    """


class CellError(RepsimError, ValueError):
    """Cells of neurons have the wrong shape, or labels that are out of range.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.cell_grams([[1.0], [2.0]], [3], n_cells=2)
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.CellError: cells: label 3 is out of range; expected 0 … 1, or -1 ...
    """


class LabelError(RepsimError, ValueError):
    """Class labels are out of range, leave a class empty, or do not contain the target.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.class_means([[1.0], [2.0]], [0, 2])
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.LabelError: labels: class 1 has no stimulus; expected every class 0 … 2
    """


class OptionError(RepsimError, ValueError):
    """An option has a value that the operation does not accept.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.centered_gram([[1.0], [2.0]], kernel="poly")
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.OptionError: kernel: 'poly'; expected one of 'linear', 'rbf'
    """


class DeviceError(RepsimError, ValueError):
    """Arrays of one call belong to different libraries or are on different devices.

    Examples
    --------
    >>> import torch
    >>> import repsim_kernels as rk
    >>> rk.cka(torch.eye(3), [[1.0], [2.0], [3.0]])
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.DeviceError: y: a numpy array on cpu, but x is a torch array on cpu; ...
    """


class LayerError(RepsimError, ValueError):
    """A model has no module of this name, or can't be cut at its output.

    Examples
    --------
    >>> import torch
    >>> import repsim_kernels as rk
    >>> from repsim_kernels.forward import AblatedForward
    >>> AblatedForward(torch.nn.Sequential(torch.nn.ReLU()).eval(), "1")
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.LayerError: layer: ...
    """


class ConvergenceError(RepsimError, ArithmeticError):
    """A decomposition did not converge, or a ridge is too small for float64.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> x = [[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]
    >>> rk.ablation_distances(x, [0, 1], metrics=["cca"], ridge=1e-30)
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.ConvergenceError: ridge: 1e-30 leaves a matrix singular to rounding; ...
    """


class GradientError(RepsimError, RuntimeError):
    """A second derivative of a similarity was requested; only the first is computed.

    Examples
    --------
    >>> import torch
    >>> import repsim_kernels as rk
    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]], requires_grad=True)
    >>> similarity = rk.cka(x, x.detach()[:, :1])
    >>> (gradient,) = torch.autograd.grad(similarity, x, create_graph=True)
    >>> gradient.square().sum().backward()
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.GradientError: cka: second derivatives are not computed, since ...
    """


class BackendUnavailable(RepsimError, RuntimeError):
    """The requested backend can't serve this call; the message gives the reason.

    Examples
    --------
    >>> import repsim_kernels as rk
    >>> rk.cka([[1.0], [2.0]], [[1.0], [2.0]], backend="triton")
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.BackendUnavailable: backend: 'triton' can't serve cka: it has ...
    """


class DegenerateWarning(UserWarning):
    """A metric is degenerate, biased or high by chance, or a test has too few permutations.

    A degenerate metric hardly depends on the representations; such a test can't be significant.

    Examples
    --------
    >>> import warnings
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> x, y = np.random.default_rng(0).standard_normal((2, 10, 50))
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", rk.DegenerateWarning)
    ...     rk.cca(x, y)
    Traceback (most recent call last):
        ...
    repsim_kernels.errors.DegenerateWarning: 50 and 50 neurons, 10 stimuli: without a ridge ...
    """


class OutOfMemoryWarning(UserWarning):
    """A device ran out of memory; the computation continues in smaller parts.

    Examples
    --------
    Stop instead of continuing more slowly:

    >>> import warnings
    >>> import repsim_kernels as rk
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", rk.OutOfMemoryWarning)
    ...     # run the model here
    """
