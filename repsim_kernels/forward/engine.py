"""`AblatedForward`: the output of a network with cells of a layer's neurons ablated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from repsim_kernels import _check_cells, _options
from repsim_kernels.errors import OptionError
from repsim_kernels.forward import checks, contexts, fills, passes
from repsim_kernels.forward.masks import Ablations
from repsim_kernels.forward.memory import resolve_batch_budget
from repsim_kernels.forward.passes import State
from repsim_kernels.forward.prefix import CutForward


class AblatedForward(CutForward):
    """The output of a network with cells of a layer's neurons ablated.

    The network up to the layer runs once for all cells; only the rest runs for each cell.

    Parameters
    ----------
    model : nn.Module
        It must be in eval mode and traceable by ``torch.fx`` or ``torch.export``. It is neither
        changed nor copied. A model compiled by ``torch.compile`` runs uncompiled;
        ``model(images)`` below means that uncompiled pass.
    layer : str or sequence of str
        A name from ``model.named_modules()``: a module or container that runs once per pass and
        returns a tensor (n, …). "name:input" is the first input of a module instead, and
        "name:heads" what the heads of an attention module of PyTorch, timm or Hugging Face return,
        (n, t, d), before the output projection: d is a contiguous slice for each of `count_heads`
        heads. Several layers share one trace and the pass of `prefixes`.
    output : int or str, optional
        Where the tensor is in the output of layers that return more than a tensor, such as 0 or
        "0.hidden".
    call : function, optional
        ``call(model, inputs)`` runs the network and returns a tensor (n, …). By default
        ``model(inputs)``, or ``model(**inputs)`` for a dict and ``model(*inputs)`` for a tuple.

    Attributes
    ----------
    layers : tuple of str
        The layers, without duplicates.

    Raises
    ------
    LayerError
        The layer is missing from the model, is not called exactly once, is in TorchScript, or has
        no heads that are known. Or the model is not a module, is in training mode, has parameters
        without shapes or values, or is a ``DataParallel`` over several devices.
    OptionError
        `output` is no index or path, `call` is no function, or REPSIM_BACKEND names no backend.

    Notes
    -----
    The first time it sees images of a new shape, layout or dtype, `prefix` compares the cut network
    on two of them with whole passes under a forward hook, which also reveals randomness and hidden
    state. That costs about six passes of the two for each layer. If the ``torch.fx`` trace differs
    from these passes, for example because ``forward`` checks a type, so is a ``torch.export``
    trace, which takes seconds to make. Most networks of Hugging Face need it. It serves every
    number of images from two for which ``forward`` takes the same path, such as the same branch of
    ``if x.shape[0] > 4``. If that fails, or for one image, a trace for this number alone is
    compared on all the images.

    Operations run under the autocast state, attention backends and default dtype that ``forward``
    sets for them. TF32 follows PyTorch's switches. No method tracks gradients.

    PyTorch runs a transformer encoder layer as one fused operation unless a module inside it has a
    hook; the two ways differ by rounding. `logits` matches the hook bit for bit, so a layer inside
    an encoder layer moves that encoder layer, and no other, off its fast path, as heads move their
    attention module. Cells without effect match the hook too; `intact` matches the model without a
    hook. An exported network keeps all encoder layers and attention off the fast path, and agrees
    with the hook up to rounding.

    On CUDA, unless ``REPSIM_BACKEND=torch``, a Triton kernel sets cells to zero and applies a ReLU
    or ReLU6 that follows the layer. With several cells per pass it also applies an eval-mode batch
    norm, or a 1x1 convolution or linear layer, which then needs no masked copies.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import repsim_kernels as rk
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    >>> forward = rk.forward.AblatedForward(model, "1")
    >>> forward
    AblatedForward(Sequential, layers=['1'], device='cpu')
    >>> state = forward.prefix(torch.ones(2, 4))
    >>> forward.logits(state, [0, 0, 1, 1, 2, 2]).shape  # cells, images, outputs
    torch.Size([3, 2, 3])

    Each of the heads of an attention module that returns a tuple, in a network that returns one:

    >>> model = nn.MultiheadAttention(8, num_heads=4, batch_first=True).eval()
    >>> def call(model, x):
    ...     return model(x, x, x)[0]
    >>> forward = rk.forward.AblatedForward(model, ":heads", call=call)
    >>> state = forward.prefix(torch.ones(2, 5, 8))  # 2 sequences of 5 tokens
    >>> heads = torch.arange(8) // (8 // forward.count_heads(":heads"))  # the head of each feature
    >>> forward.logits(state, heads).shape
    torch.Size([4, 2, 5, 8])
    """

    def intact(self, state: State, *, memory: int | str | None = None) -> Tensor:
        """The network's output without ablation; computed once for each state.

        Parameters
        ----------
        state : State
            From `prefix` or `prefixes` of this object.
        memory : int or str, optional
            As in `logits`.

        Returns
        -------
        logits : tensor, (n, …)
            Bit-identical to ``model(images)``. A forward hook that changes nothing can still change
            the output by rounding; for an empty cell, `logits` returns what such a hook yields.

        Raises
        ------
        OptionError
            The state belongs to another object, or `memory` is not a size.
        LayerError
            The state's tensors were written to, or the model is in training mode.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        >>> forward = rk.forward.AblatedForward(model, "1")
        >>> images = torch.ones(2, 4)
        >>> torch.equal(forward.intact(forward.prefix(images)), model(images))
        True
        """
        self._check_state(state)
        budget = resolve_batch_budget(memory, state._data.device)
        with contexts.run_eagerly():
            return passes.run_intact(state, budget).clone()

    def logits(
        self,
        state: State,
        cells: Any,
        n_cells: int | None = None,
        *,
        fill: Any = "zero",
        seed: int = 0,
        batch: int | None = None,
        memory: int | str | None = None,
    ) -> Tensor:
        """The network's output with the neurons of one cell replaced, for every cell.

        Parameters
        ----------
        state : State
            From `prefix` or `prefixes` of this object.
        cells : integer or boolean array, or sparse membership
            Labels give each neuron's cell, 0 … n_cells - 1, or -1 for no cell; a boolean mask gives
            the neurons of one cell. Both are (p,), in the C order of one image's activation (…), or
            broadcast to its shape. The cells of a membership may overlap: booleans (C, p), a SciPy
            CSR array (C, p), or a tuple (indptr, indices).
        n_cells : int, optional
            C; by default the largest label + 1.
        fill : {"zero", "mean", "resample"}, number, array or State
            What a cell's neurons become: zero; each neuron's mean over the images of `state` (for a
            mean over others, pass an array); its value for another of these images; numbers of the
            activation's dtype that broadcast to (n, …); or the activation of another state of the
            same layer, for n other images (patching).
        seed : int
            For "resample": the images are permuted by the first permutation drawn by
            ``numpy.random.default_rng(seed)`` that moves every image.
        batch : int, optional
            The most cells to run in one pass. By default as many as fit in `memory` on CUDA, and
            one on a CPU, or more if one cell has too few images to amortise reading the weights, or
            if the pass stays below 16 MiB.
        memory : int or str, optional
            Bytes for one pass, or text such as "8GiB". It limits the cells, and if necessary the
            images, of one pass. By default half of the free memory, on CUDA at most 8 GiB. Memory
            use is estimated from the tensors alive at one moment, without the workspaces of
            kernels. If a GPU still runs out of memory, passes are half as large from then on.

        Returns
        -------
        logits : tensor, (C, n, …)
            With ``batch=1`` and enough memory, bit-identical to the output under a forward hook
            that writes the fill into a clone; otherwise equal up to rounding. Cells that the fill
            changes for no image get the output under a hook that returns a clone.

        Raises
        ------
        CellError, DtypeError, ShapeError, DeviceError
            The cells or the fill have the wrong length, range, shape, dtype or device.
        OptionError
            `fill` is no such name, `batch` is not a count, `memory` is not a size, or a state
            belongs to another object or layer.
        LayerError
            The states' tensors were written to, or the model is in training mode.

        Warns
        -----
        OutOfMemoryWarning
            A GPU ran out of memory, and passes became smaller.

        Notes
        -----
        If images influence each other, or the rest of the network reads a value that is not a
        tensor (n, …), each pass has one cell and all images.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> import repsim_kernels as rk
        >>> model = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False)).eval()
        >>> _ = model[1].weight.data.fill_(1)
        >>> forward = rk.forward.AblatedForward(model, "0")
        >>> state = forward.prefix(torch.tensor([[1.0, 2.0, 4.0]]))
        >>> forward.intact(state)
        tensor([[7.]])
        >>> forward.logits(state, [0, 1, 1]).flatten()  # without neuron 0; without neurons 1 and 2
        tensor([6., 1.])
        >>> other = forward.prefix(torch.tensor([[10.0, 20.0, 40.0]]))
        >>> forward.logits(state, [0, 1, 1], fill=other).flatten()
        tensor([16., 61.])
        """
        batch = None if batch is None else _options.check_count(batch, "batch")
        seed = _options.check_count(seed, "seed", minimum=0)
        self._check_state(state)
        act = state._data
        budget = resolve_batch_budget(memory, act.device)
        shape = tuple(act.shape[1:])
        checked, n_cells = _check_cells.check_cells(cells, act[0].numel(), n_cells, shape=shape)
        with contexts.run_eagerly():
            ablations = Ablations(checked, n_cells, act.device, fills.make_fill(fill, state, seed))
            return passes.run_ablations(state, ablations, batch, budget)

    def _check_state(self, state: State) -> None:
        if not isinstance(state, State):
            raise OptionError(f"state: {_options.short_repr(state)}; expected one from prefix()")
        if state._owner is not self:
            raise OptionError("state: made by another AblatedForward; expected one from this one")
        checks.check_eval(self.model)
