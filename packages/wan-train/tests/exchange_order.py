"""Called in a process that trains (``warm_ranks.Call``): what the backward passes of column-parallel linears call."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = ("aten::mm", "aten::addmm_")


class _Noting(TorchDispatchMode):
    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in _PRODUCTS:
            self.calls.append("product")
        elif func.name().startswith("c10d::"):
            self.calls.append(func.name().removeprefix("c10d::").strip("_"))
        return func(*args, **(kwargs or {}))


class _NotingWork:
    """A handle of an exchange, whose wait is noted."""

    def __init__(self, work: Any, calls: list[str]) -> None:
        self._work, self._calls = work, calls

    def wait(self, *arguments: Any) -> Any:
        """Wait for the exchange."""
        self._calls.append("wait")
        return self._work.wait(*arguments)


def note_exchanges(path: str) -> None:
    """Write, when the run ends, the calls of each such backward pass, in their order."""
    import wan_train.model.column_products as column_products
    from wan_model.system import torchrun
    from wan_train.loop.callback import WanCallback

    found: list[list[str]] = []
    backward, end = column_products._ColumnProducts.backward, WanCallback.on_train_end
    exchanges = {name: getattr(torch.distributed, name) for name in ("all_reduce", "reduce_scatter_tensor")}

    def noting_backward(ctx: Any, *gradients: Tensor) -> Any:
        calls: list[str] = []
        found.append(calls)

        def noting(exchange: Any) -> Any:
            return lambda *args, **options: _NotingWork(exchange(*args, **options), calls)

        try:
            for name, exchange in exchanges.items():
                setattr(torch.distributed, name, noting(exchange))
            with _Noting(calls):
                return backward(ctx, *gradients)
        finally:
            for name, exchange in exchanges.items():
                setattr(torch.distributed, name, exchange)

    def noting_end(self: WanCallback, context: Any) -> None:
        if torchrun.rank() == 0:
            Path(path).write_text(json.dumps(found))
        end(self, context)

    column_products._ColumnProducts.backward = staticmethod(noting_backward)  # type: ignore[assignment]
    WanCallback.on_train_end = noting_end  # type: ignore[method-assign]
