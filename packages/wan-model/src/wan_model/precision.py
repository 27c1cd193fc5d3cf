"""The precisions that commands offer, by name. Imports no torch, so that a command checks its arguments first."""

# Of the autoencoder: the type of its weights, and whether a GPU may round the inputs of fp32 convolutions to TF32.
VAE_PRECISIONS: dict[str, tuple[str, bool]] = {
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "bfloat16": ("bfloat16", False),
}
# Of the transformer and the text encoder, whose matrix products are not rounded to TF32: torch's names of the types.
DTYPES = tuple(name for name, (_, tf32) in VAE_PRECISIONS.items() if not tf32)
