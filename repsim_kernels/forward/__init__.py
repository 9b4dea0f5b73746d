"""Run a network with cells of a layer's neurons ablated, without rerunning it up to the layer."""

from repsim_kernels.forward.cost import Cost
from repsim_kernels.forward.engine import AblatedForward
from repsim_kernels.forward.passes import State

__all__ = ["AblatedForward", "Cost", "State"]
