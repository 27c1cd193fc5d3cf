"""Parallelism: which process computes which part of a video.

Classifier-free guidance evaluates the model twice a step, with the prompt and with the negative prompt. With
``cfg_parallel`` one half of the processes computes the first branch and the other half the second. The processes of a
branch divide the tokens of the video (``wan_model.dit.context_parallel``). The transformer's weights may be sharded
over all processes (``fully_shard``), and the tiles of the decoder are divided over them. Every process takes the same
steps from the same noise.

Shapes: S tokens, K values of a token.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from wan_infer.request.options import ParallelOptions
from wan_model.dit.context_parallel import ContextParallel, all_gather_single
from wan_model.dit.model import WanDiT
from wan_model.dit.ops import TorchOps
from wan_model.system import torchrun


@dataclasses.dataclass
class Parallelism:
    """The process groups, and the share of this process.

    Attributes:
        rank, world_size: among all processes.
        context: the processes that divide the tokens of a branch; None where there is one.
        branch: the branch of guidance that this process computes, 0 the prompt's, 1 the negative prompt's; None for
            both.
        branch_group: the two processes that hold the same tokens of both branches.
        sharded: whether the transformer's weights are sharded over all processes.
    """

    rank: int = 0
    world_size: int = 1
    context: ContextParallel | None = None
    branch: int | None = None
    branch_group: Any = None
    sharded: bool = False

    @classmethod
    def initialize(cls, device: torch.device, options: ParallelOptions | None = None) -> "Parallelism":
        """Create the process groups, from torchrun's environment variables; collective.

        Args:
            device: of this process.
            options: see ``ParallelOptions``.

        Raises:
            ValueError: options that do not allow this number of processes.
        """
        options = options or ParallelOptions()
        world_size = torchrun.world_size()
        options.check(world_size)
        if world_size == 1:
            return cls()
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
                dist.init_process_group("nccl", device_id=device)
            else:
                dist.init_process_group("gloo")
        rank, branches = dist.get_rank(), 2 if options.cfg_parallel else 1
        size = world_size // branches
        # new_group is collective: every process creates every group.
        context_groups = [dist.new_group(list(range(half * size, (half + 1) * size))) for half in range(branches)]
        branch_groups = [dist.new_group([index, index + size]) for index in range(size)] if branches == 2 else []
        branch, index = divmod(rank, size)
        return cls(
            rank,
            world_size,
            ContextParallel(context_groups[branch]) if size > 1 else None,
            branch if branches == 2 else None,
            branch_groups[index] if branches == 2 else None,
            options.shard_weights,
        )

    @property
    def ops(self) -> TorchOps:
        """The operations that the transformer is built with."""
        return TorchOps(context=self.context)

    def shard(self, model: WanDiT, device: torch.device) -> None:
        """With ``sharded``, shard the weights of every block over the processes; before the weights are loaded.

        A block is gathered when it is called, and freed after the call.
        """
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (self.world_size,))
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "text_keys")
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "prepare_text")

    def gather_branches(self, velocity_SK: Float[Tensor, "S K"]) -> Float[Tensor, "2 S K"]:
        """Gather the velocities of both branches, the prompt's first; with ``cfg_parallel``."""
        both = velocity_SK.new_empty(2, *velocity_SK.shape)
        all_gather_single(both.view(-1, velocity_SK.shape[1]), velocity_SK.contiguous(), group=self.branch_group)
        return both

    def broadcast(self, values: list[Tensor] | None) -> list[Tensor]:
        """Broadcast tensors of rank 0 to every rank, in main memory; the other ranks pass None."""
        if self.world_size == 1:
            assert values is not None, "the only process is rank 0"
            return values
        shapes: list[Any] = [None if values is None else [(tuple(value.shape), value.dtype) for value in values]]
        dist.broadcast_object_list(shapes, src=0)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        received = []
        for index, (shape, dtype) in enumerate(shapes[0]):
            tensor = torch.empty(shape, dtype=dtype) if values is None else values[index]
            tensor = tensor.to(device)
            dist.broadcast(tensor, src=0)
            received.append(tensor.cpu())
        return received

    def max(self, value: int) -> int:
        """The maximum over all ranks."""
        if self.world_size == 1:
            return value
        values: list[int] = [0] * self.world_size
        dist.all_gather_object(values, value)
        return max(values)

    def close(self) -> None:
        """Destroy the process groups; collective."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
