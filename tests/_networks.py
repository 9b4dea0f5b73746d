"""Networks in mixed modes, and snapshots of all that a user could see change in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def mix_modes(model: nn.Module) -> nn.Module:
    """Put some modules in training mode, freeze some parameters, and give the others gradients."""
    for i, module in enumerate(model.modules()):
        module.training = i % 3 > 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 > 0)
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, i)
    return model


def snapshot(model: nn.Module) -> list[Any]:
    """All that a user could see change in a model: tensors by value, other attributes by id."""
    items: list[Any] = []
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items()}
        hooks = [list(table) for key, table in vars(module).items() if "hooks" in key and table]
        items.append((name, module.training, attributes, hooks, list(module._modules)))
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, t in named:
        values = t.detach().numpy().tobytes()
        grad = None if t.grad is None else (id(t.grad), t.grad.numpy().tobytes())
        items.append((name, id(t), t.data_ptr(), t.device, t.requires_grad, values, grad))
    return items
