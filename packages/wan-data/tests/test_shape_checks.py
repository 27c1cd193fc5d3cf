"""The shapes in annotations are checked while these tests run."""

import jaxtyping
import pytest
import torch

from wan_data.prepare.encoding.encoder import encode_batch
from wan_data.shards.serialization import tensor_to_pth
from wan_data.shards.writer import Sample


def test_wrong_shapes_and_types_are_refused():
    latent, text = torch.zeros(16, 1, 2, 2), torch.zeros(3, 8)
    Sample("key", latent, text, {})
    for wrong in ((latent[0], text), (latent, text[0]), (latent.int(), text)):
        with pytest.raises(jaxtyping.TypeCheckError):
            Sample("key", *wrong, {})
    with pytest.raises(jaxtyping.TypeCheckError):
        encode_batch(None, [torch.zeros(5, 32, 48, 3)])
    with pytest.raises(jaxtyping.TypeCheckError):
        tensor_to_pth("a tensor")
