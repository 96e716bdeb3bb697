"""Which module is running: callbacks on entering and leaving every module's forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


def module_names(root: nn.Module | None) -> dict[int, str]:
    """The first path of every module in `root`, by id; a module used in two places has one name. The root is "".

    >>> from torch import nn
    >>> sorted(module_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).values())
    ['', '0', '1']
    """
    return {} if root is None else {id(module): name for name, module in root.named_modules()}


@contextlib.contextmanager
def watch_modules(enter: Callable[[nn.Module], None], leave: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `enter` before and `leave` after every forward of any module in the process, even if the forward raises."""

    def before(module: nn.Module, args: Any) -> None:
        enter(module)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        leave(module)

    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
