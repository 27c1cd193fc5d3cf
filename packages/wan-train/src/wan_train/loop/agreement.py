"""What a run's data and model must share, compared before the first step.

The latent space (``LatentSpec``) is the data's, as their manifest records it. The length that texts are padded to is
the transformer's (``model.transformer.text_len``): it follows from the data unless initial weights or the configuration
say otherwise. Checkpoints and exports record both, and the sampler reads them there.
"""

import dataclasses
from typing import Any

from wan_model.config import OFFICIAL_TEXT_LENGTH, TEXT_LENGTH_KEY
from wan_model.weights.model_folder import latent_spec_of
from wan_model.weights.transformer import read_trained_spec
from wan_train.model.provider import WanModelProvider

_KEY = f"model.transformer.{TEXT_LENGTH_KEY}"


def check_data(model: WanModelProvider, data: str) -> None:
    """Refuse data that the model does not fit.

    Args:
        model: the section, with the latent space of the data.
        data: their path.

    Raises:
        ValueError: latents or texts have another width than the transformer takes, or the initial weights are of
            another latent space and record it, or have an autoencoder and a text encoder beside them.
    """
    sizes, spec = model.wan_config, model.spec
    assert spec is not None, "it was read from the data"
    for what, got, wanted in (
        ("latents have {} channels", spec.channels, sizes.in_channels),
        ("text embeddings are {} wide", spec.text_dim, sizes.text_dim),
    ):
        if got != wanted:
            raise ValueError(
                f"the dataset's {what.format(got)}, the model takes {wanted}; prepare the data with the model's own "
                "autoencoder and text encoder"
            )
    if (initial := model.initial_weights) is None:
        return
    known = [read_trained_spec(initial.folder)]
    whole = initial.folder.parent
    if all((whole / part).is_dir() for part in ("vae", "text_encoder")):
        known.append(latent_spec_of(whole))
    for theirs in known:
        if theirs is not None:
            # What captions were cut to need not be equal, see below.
            comparable = dataclasses.replace(theirs, text_length=spec.text_length)
            comparable.require_same(spec, f"the model {initial.name}", f"the data {data}")


def with_text_length(model: WanModelProvider, dataset: Any) -> dict[str, Any]:
    """``model.transformer`` with the number of tokens that texts are padded to.

    It is as configured, else as the initial weights and the data have it, else the official 512.

    Args:
        model, dataset: the sections; the latent space of a dataset has been read.

    Raises:
        ValueError: the weights were trained with another length than the data have and none is configured, or texts
            are longer than it.
    """
    given: int | None = model.transformer.get(TEXT_LENGTH_KEY)
    data = None if dataset.mock or model.spec is None else model.spec.text_length
    weights = model.initial_weights
    initial = None if weights is None else weights.config.text_length
    if given is None and weights is not None and data is not None and initial != data:
        raise ValueError(
            f"the captions of {dataset.path} were cut to {data} tokens and the model {weights.name} was trained on "
            f"texts padded to {initial}; prepare the data with --text-length {initial}, or set {_KEY} to {initial} or "
            f"{data}, which texts are padded to from then on"
        )
    chosen = next(length for length in (given, initial, data, OFFICIAL_TEXT_LENGTH) if length is not None)
    if data is not None and data > chosen:
        raise ValueError(
            f"the captions of {dataset.path} were cut to {data} tokens and {_KEY} is {chosen}; set it to {data}, or "
            f"prepare the data with --text-length {chosen}"
        )
    if dataset.mock and (longest := dataset.mock_settings.context_length) > chosen:
        raise ValueError(f"dataset.mock_settings.context_length is {longest}; expected at most {_KEY}, {chosen}")
    return {**model.transformer, TEXT_LENGTH_KEY: chosen}
