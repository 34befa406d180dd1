"""Look at what goes into a module of a model and what comes out, while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def on_input(module: nn.Module, take: Callable[[Tensor], None]) -> RemovableHandle:
    """Show `take` the hidden states that a module is called with, until the handle is removed."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        take(inputs[0] if inputs else named["hidden_states"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, take: Callable[[Tensor], None]) -> RemovableHandle:
    """Show `take` the hidden states that a module returns, until the handle is removed."""
    return module.register_forward_hook(lambda _module, _inputs, output: take(hidden_of(output)))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer returns: a tensor, or a tuple that begins with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
