"""Several processes on one video: which of them computes what.

Guidance asks the model twice a step, with the prompt and with the negative prompt: with ``cfg_parallel`` one half of
the processes answers the first and the other half the second. The processes of a half share the tokens of the video
(``wan_model.ContextParallel``). The weights may be spread over all of them (``fully_shard``), and so are the tiles of
the decoder. Every process takes the same steps from the same noise.

Shapes: S tokens, K values of a token.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from wan_infer.request.settings import check_processes
from wan_infer.runtime.launch import processes
from wan_model.dit.context_parallel import ContextParallel
from wan_model.dit.model import WanDiT
from wan_model.dit.ops import TorchOps


@dataclasses.dataclass
class Sharing:
    """This process's part.

    Attributes:
        rank, ranks: of all processes.
        context: the processes that share a branch's tokens; None where there is one.
        branch: the branch of guidance that this process answers, 0 the prompt's, 1 the negative prompt's; None for
            both.
        pair: the processes that hold the same tokens of both branches.
        weights: whether the transformer's weights are spread over all processes.
    """

    rank: int = 0
    ranks: int = 1
    context: ContextParallel | None = None
    branch: int | None = None
    pair: Any = None
    weights: bool = False

    @classmethod
    def join(cls, device: torch.device, *, cfg_parallel: bool = False, shard_weights: bool = False) -> "Sharing":
        """Meet the other processes; collective. A single process meets nobody.

        Raises:
            ValueError: branches for an odd number of processes, or weights to share with nobody.
        """
        ranks = processes()
        check_processes(ranks, cfg_parallel=cfg_parallel, shard_weights=shard_weights)
        if ranks == 1:
            return cls()
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
                dist.init_process_group("nccl", device_id=device)
            else:
                dist.init_process_group("gloo")
        rank, halves = dist.get_rank(), 2 if cfg_parallel else 1
        size = ranks // halves
        # Every process takes part in making every group.
        context_groups = [dist.new_group(list(range(half * size, (half + 1) * size))) for half in range(halves)]
        pairs = [dist.new_group([place, place + size]) for place in range(size)] if cfg_parallel else []
        branch, place = divmod(rank, size)
        return cls(
            rank,
            ranks,
            ContextParallel(context_groups[branch]) if size > 1 else None,
            branch if cfg_parallel else None,
            pairs[place] if cfg_parallel else None,
            shard_weights,
        )

    @property
    def ops(self) -> TorchOps:
        """The runtime that the transformer is built for."""
        return TorchOps(context=self.context)

    def spread_weights(self, model: WanDiT, device: torch.device) -> None:
        """Where asked for, have each process keep its share of every layer; before the weights are there.

        A layer is gathered when it is called and given up behind it.
        """
        if not self.weights:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (self.ranks,))
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "text_keys")
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "prepare_text")

    def both_branches(self, velocity_SK: Float[Tensor, "S K"]) -> Float[Tensor, "2 S K"]:
        """Of this process's branch and of its partner's, the prompt's first."""
        both = velocity_SK.new_empty(2, *velocity_SK.shape)
        dist.all_gather_into_tensor(both.view(-1, velocity_SK.shape[1]), velocity_SK.contiguous(), group=self.pair)
        return both

    def from_first(self, values: list[Tensor] | None) -> list[Tensor]:
        """Tensors of the first process, on all; the others give None. In main memory."""
        if self.ranks == 1:
            assert values is not None, "the only process is the first"
            return values
        box: list[Any] = [None if values is None else [(tuple(value.shape), value.dtype) for value in values]]
        dist.broadcast_object_list(box, src=0)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        received = []
        for index, (shape, dtype) in enumerate(box[0]):
            tensor = torch.empty(shape, dtype=dtype) if values is None else values[index]
            tensor = tensor.to(device)
            dist.broadcast(tensor, src=0)
            received.append(tensor.cpu())
        return received

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.ranks == 1:
            return value
        values: list[int] = [0] * self.ranks
        dist.all_gather_object(values, value)
        return max(values)

    def leave(self) -> None:
        """The end; collective."""
        if self.ranks > 1 and dist.is_initialized():
            dist.destroy_process_group()
