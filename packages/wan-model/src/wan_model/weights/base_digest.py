"""A digest of a transformer's weights, equal however they are spread over files: what an adapter was trained on."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from wan_model.weights.model_folder import DIFFUSERS_STEM, open_weights, weight_files


def tensor_digests(folder: Path, rank: int = 0, ranks: int = 1, *, threads: int = 1) -> dict[str, str]:
    """SHA-256 of type, shape and bytes of each tensor of a ``transformer`` folder, hexadecimal, by key.

    Args:
        folder: in diffusers' layout.
        rank, ranks: compute every ``ranks``-th of them, from ``rank`` on.
        threads: that compute; each holds a tensor.

    Raises:
        ValueError: the files are missing or damaged.
    """
    files = weight_files(Path(folder), DIFFUSERS_STEM)
    digests: dict[str, str] = {}
    mine: Sequence[str] = sorted(files)[rank::ranks]
    with ThreadPoolExecutor(threads) as pool:
        for path in sorted({files[key] for key in mine}):
            with open_weights(path) as file:
                keys = [key for key in mine if files[key] == path]
                digests.update(
                    zip(keys, pool.map(lambda key, file=file: _digest(file.get_tensor(key)), keys), strict=True)
                )
    return digests


def _digest(tensor: Tensor) -> str:
    tensor = tensor.contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}/{list(tensor.shape)}/".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def joint_digest(digests: Mapping[str, str]) -> str:
    """One digest of all tensors' digests."""
    lines = "".join(f"{key} {digests[key]}\n" for key in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
