"""Part of ``engine_probe``: what devices are where there is no CUDA."""

from typing import Any
from unittest import mock

import torch


class _BackwardOnCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad + torch.ones(grad.shape, device=torch.cuda.current_device())


def device_answers() -> dict[str, object]:
    index = torch.cuda.current_device()
    x = torch.zeros(2, requires_grad=True)
    _BackwardOnCuda.apply(x).sum().backward()
    hooked = torch.zeros(2, requires_grad=True)
    hooked.register_hook(lambda grad: grad * torch.full((2,), 3.0, device="cuda"))
    hooked.sum().backward()
    assert x.grad is not None
    assert hooked.grad is not None
    return {
        "by name": torch.zeros(1, device="cuda:0").device.type,
        "by number": torch.zeros(1, device=index).device.type,
        "by object": torch.tensor([1.0], device=torch.device("cuda", 0)).device.type,
        "moved": torch.zeros(1).to("cuda").device.type,
        "moved by method": torch.zeros(1).cuda().device.type,
        "module": next(torch.nn.Linear(1, 1).cuda(index).parameters()).device.type,
        "index is int": isinstance(index, int),
        "type name": torch.zeros(1).type(),
        "cpu stays": torch.zeros(1, device="cpu").device.type,
        "gradient of custom backward": x.grad.tolist(),
        "gradient of hook": hooked.grad.tolist(),
    }


def cuda_build_answers() -> dict[str, object]:
    """With torch's C functions as a CUDA build has them on a machine without a driver.

    An optimizer of torch 2.13 asks for the stream of the accelerator, one of torch 2.11 for that of CUDA.
    """

    def no_driver(*args: object) -> None:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0)
    with (
        mock.patch.object(torch._C, "_accelerator_getAccelerator", return_value=torch.device("cuda")),
        mock.patch.object(torch._C, "_accelerator_getStream", no_driver),
        mock.patch.object(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", no_driver),
    ):
        optimizer.step()
        return {
            "stepped": weight.tolist(),
            "capturing": [torch.cuda.is_current_stream_capturing(), torch.cuda.graphs.is_current_stream_capturing()],
            "accelerators": [
                torch.accelerator.current_accelerator() is not None,
                torch.accelerator.is_available(),
                torch.accelerator.device_count(),
            ],
        }
