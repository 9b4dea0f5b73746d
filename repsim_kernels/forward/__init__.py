"""The rest of a network after a layer, for many masks of that layer's activation."""

from repsim_kernels.forward.cost import Cost
from repsim_kernels.forward.engine import AblatedForward
from repsim_kernels.forward.passes import State

__all__ = ["AblatedForward", "Cost", "State"]
