"""Weights of the transformer: official initialisation, loading and saving of diffusers' ``transformer`` folders.

A tensor-parallel or pipeline-parallel model reads its shard of each full tensor, so the model does not depend on the
number of ranks.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wan_model.config import WanConfig
from wan_model.dit.adapters import adapter_parameters
from wan_model.dit.lora import DOWN, UP, is_adapter_key
from wan_model.dit.model import Stage, WanDiT
from wan_model.latent_spec import LatentSpec
from wan_model.system.files import atomic_path, sync_folder, write_json
from wan_model.system.torchrun import local_world_size, processors
from wan_model.weights.model_folder import DIFFUSERS_STEM, open_weights, read_json, stored_shape, weight_files
from wan_model.weights.safetensors_file import write_tensors

# Beside the weights, where they were trained on a dataset; other programs ignore it.
LATENT_SPEC_NAME = "latent_spec.json"
_READ_BATCH_BYTES = 64 * 2**20


def full_shape(model: WanDiT, parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter in the whole model."""
    shape = list(parameter.shape)
    if part := model.ops.partition(parameter):
        axis, _, ranks = part
        shape[axis] *= ranks
    return tuple(shape)


def local_slices(model: WanDiT, parameter: nn.Parameter) -> tuple[slice, ...]:
    """The slices of the full tensor that are this rank's shard of a parameter."""
    if (dtensor := _as_dtensor(parameter)) is not None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, starts = compute_local_shape_and_global_offset(dtensor.shape, dtensor.device_mesh, dtensor.placements)
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    slices = [slice(0, size) for size in parameter.shape]
    if part := model.ops.partition(parameter):
        axis, rank, _ = part
        size = parameter.shape[axis]
        slices[axis] = slice(rank * size, (rank + 1) * size)
    return tuple(slices)


def local_tensor(parameter: Tensor) -> Tensor:
    """The local tensor of a parameter, which may be sharded with ``fully_shard``."""
    dtensor = _as_dtensor(parameter)
    return parameter if dtensor is None else dtensor.to_local()


def _as_dtensor(parameter: Tensor) -> Any:
    """The parameter if it is a DTensor, else None; importing DTensor takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return parameter if module is not None and isinstance(parameter, module.DTensor) else None


def expected_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of the whole model."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in WanDiT(config).state_dict().items()}


def initial_tensor(key: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """The official initial value of one full tensor, fp32, drawn from a generator of its own.

    Source: ``WanModel.init_weights`` of the official release: xavier-uniform linears and patch embedding,
    N(0, 0.02) for the text and time embedders, N(0, 1/width) modulation tables, zero biases, zero head. Adapters as
    peft's: A Kaiming-uniform with a = sqrt(5), B zero.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if key.endswith("scale_shift_table"):
        return torch.randn(shape, generator=generator).div_(shape[-1] ** 0.5)
    if key.endswith(("bias", f".{UP}.weight")) or key.startswith("proj_out."):
        return torch.zeros(shape)
    if key.endswith(f".{DOWN}.weight"):
        return torch.rand(shape, generator=generator).mul_(2).sub_(1).div_(shape[1] ** 0.5)
    if ".norm" in key:
        return torch.ones(shape)
    if ".time_embedder." in key or ".text_embedder." in key:
        return torch.randn(shape, generator=generator).mul_(0.02)
    fan_out, fan_in = shape[0], torch.Size(shape[1:]).numel()
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(bound)


@torch.no_grad()
def init_weights(model: WanDiT, *, seed: int) -> None:
    """Fill a model, or a rank's shard of it, with the official initial values.

    Each full tensor depends only on the seed and its key, so in every layout the ranks get shards of the same tensors.
    For that every rank draws the whole of each tensor that it has a shard of.
    """
    _draw(model, dict(model.named_parameters()), seed)


@torch.no_grad()
def init_adapters(model: WanDiT, *, seed: int) -> None:
    """Fill the adapters of a model, or of a rank's shard of it, with their initial values; see ``init_weights``."""
    _draw(model, adapter_parameters(model), seed)


@torch.no_grad()
def load_adapters(model: WanDiT, adapters: Mapping[str, Tensor]) -> None:
    """Copy A and B of a whole model, by diffusers' key, into the adapters of a model, or of a rank's shard of it."""
    for key, parameter in adapter_parameters(model).items():
        local_tensor(parameter).copy_(adapters[key][local_slices(model, parameter)])


def _draw(model: WanDiT, parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    shapes = {key: full_shape(model, parameter) for key, parameter in parameters.items()}
    workers = _drawing_threads()
    with ThreadPoolExecutor(workers) as pool:
        # Not all at once: whole tensors are drawn, also where this rank holds a shard of them.
        for start in range(0, len(shapes), workers):
            keys = list(shapes)[start : start + workers]
            for key, whole in zip(
                keys, pool.map(lambda key: initial_tensor(key, shapes[key], seed=seed), keys), strict=True
            ):
                local_tensor(parameters[key]).copy_(whole[local_slices(model, parameters[key])])


def _drawing_threads() -> int:
    """Threads for the draws of a process, each of which is one thread's work: its share of the machine's processors."""
    return min(8, max(1, processors() // local_world_size()))


def read_config(folder: Path) -> WanConfig:
    """The configuration of a diffusers ``transformer`` folder.

    Raises:
        ValueError: the file is missing, or describes a model that is not Wan 2.1 text-to-video.
    """
    file = Path(folder) / "config.json"
    content = read_json(file)
    try:
        return WanConfig.from_diffusers(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_trained_spec(folder: Path) -> LatentSpec | None:
    """The latent space that the weights of a ``transformer`` folder were trained in; None if it is not recorded.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(folder) / LATENT_SPEC_NAME
    if not file.exists():
        return None
    content = read_json(file)
    try:
        return LatentSpec.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_keys(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a set of tensors, by key and shape, that is not exactly the expected one.

    Raises:
        ValueError: keys are missing, unexpected or of another shape; the message names the first of them.
    """
    problems = [f"{key} is missing (expected {list(expected[key])})" for key in expected if key not in found]
    problems += [f"{key} is unexpected ({list(found[key])})" for key in found if key not in expected]
    problems += [
        f"{key} has shape {list(found[key])}, expected {list(expected[key])}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the weights in {where} are not this model's: {'; '.join(problems[:5])}{more}")


def _stored_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    # From the files, because an index may be wrong.
    for path in sorted(set(files.values())):
        with open_weights(path) as file:
            for key in file.keys():  # noqa: SIM118  the file is no mapping
                yield key, path, stored_shape(file, key, path)


def _check_stored(folder: Path, config: WanConfig) -> list[tuple[str, Path, tuple[int, ...]]]:
    """Key, file and shape of all tensors of a folder, which are those of the model."""
    stored = list(_stored_tensors(weight_files(folder, DIFFUSERS_STEM)))
    check_keys({key: shape for key, _, shape in stored}, expected_shapes(config), str(folder))
    return stored


@torch.no_grad()
def load_weights(model: WanDiT, folder: Path) -> None:
    """Copy a diffusers ``transformer`` folder into a model, or a rank's shard of it, tensor by tensor.

    Adapters of the model are left as they are.

    Raises:
        ValueError: a missing, unexpected or misshapen key.
    """
    _copy(model, _check_stored(Path(folder), model.config))


def _copy(model: WanDiT, stored: Sequence[tuple[str, Path, tuple[int, ...]]]) -> None:
    """Copy tensors of files, given as by ``_check_stored``."""
    files = {key: path for key, path, _ in stored}
    parameters = {key: parameter for key, parameter in model.named_parameters() if not is_adapter_key(key)}
    for path in sorted({files[key] for key in parameters}):
        for keys in _batches([key for key, place, _ in stored if place == path and key in parameters], parameters):
            with open_weights(path) as file:
                for key in keys:
                    parameter = parameters[key]
                    local_tensor(parameter).copy_(file.get_slice(key)[local_slices(model, parameter)])


def _batches(keys: Sequence[str], parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    # Pages that were read stay in memory while the file is open, so the file is reopened for each batch.
    batch: list[str] = []
    read = 0
    for key in keys:
        batch.append(key)
        read += local_tensor(parameters[key]).nbytes
        if read >= _READ_BATCH_BYTES:
            yield batch
            batch, read = [], 0
    if batch:
        yield batch


@torch.no_grad()
def load_transformer(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    stage: Stage | None = None,
) -> WanDiT:
    """Build a model from a diffusers ``transformer`` folder, in evaluation mode, for one device.

    Memory: the weights and a second copy of the largest tensor (see ``WanDiT.to_precision`` for ``dtype``).

    Parameters are created twice here, which loses attributes that another runtime sets on them: with other ops than
    ``TorchOps``, build the model first and fill it with ``load_weights``.
    """
    config = read_config(folder)
    # Before anything is allocated: a configuration may claim any size.
    stored = _check_stored(Path(folder), config)
    with torch.device("meta"):
        model = WanDiT(config, stage=stage)
    model = model.to_precision(dtype).to_empty(device=device)
    _copy(model, stored)
    return model.eval()


def save_transformer(
    state: Mapping[str, Tensor],
    config: WanConfig,
    folder: Path,
    *,
    spec: LatentSpec | None = None,
    shard_bytes: int = 10**10,
) -> None:
    """Write a diffusers ``transformer`` folder; each file is written atomically.

    An earlier model in the folder is replaced when all files have been written. A process that is killed meanwhile
    leaves either model, or a folder that readers refuse.

    Args:
        state: every tensor of the whole model, by key.
        config: its sizes.
        folder: the output folder; created if absent.
        spec: the latent space that they were trained in, if known; for ``read_trained_spec``.
        shard_bytes: above this many bytes the weights are split over several files with an index.

    Raises:
        ValueError: the tensors are not exactly the model's.
    """
    folder = Path(folder)
    check_keys(
        {key: tuple(value.shape) for key, value in state.items()}, expected_shapes(config), "the state to be saved"
    )
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= size
    names = [f"{DIFFUSERS_STEM}.safetensors"]
    if len(shards) > 1:
        names = [f"{DIFFUSERS_STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = folder / f"{DIFFUSERS_STEM}.safetensors.index.json"
    with contextlib.ExitStack() as written:
        for name, shard in zip(names, shards, strict=True):
            partial = written.enter_context(atomic_path(folder / name))
            write_tensors(shard, partial)
        # Readers prefer an index: with that of an earlier save they would read a mixture of both while files get their
        # names, and afterwards the earlier weights.
        index.unlink(missing_ok=True)
        (folder / LATENT_SPEC_NAME).unlink(missing_ok=True)  # it may be none of the new weights'
        sync_folder(folder)
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for shard in shards for tensor in shard.values())
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        table = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(index, table)
    for path in folder.glob(f"{DIFFUSERS_STEM}*.safetensors"):
        if path.name not in names:
            path.unlink()
    if spec is not None:
        write_json(folder / LATENT_SPEC_NAME, spec.to_dict())
    write_json(folder / "config.json", config.to_diffusers())
