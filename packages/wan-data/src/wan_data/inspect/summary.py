"""The last words of ``wan-data prepare``."""

from pathlib import Path

from wan_data.shards.manifest import Manifest


def summary_of(manifest: Manifest, folder: Path) -> list[str]:
    """Lines that say what was written and what was not."""
    rejected = [source for source in manifest.sources if source.verdict == "rejected"]
    splits = ", ".join(f"{count} {split}" for split, count in manifest.samples.items())
    sizes = {shape.latent for shape in manifest.shapes}
    lines = [
        f"{sum(manifest.samples.values())} samples ({splits}) of {len(sizes)} shapes in {len(manifest.shards)} shards "
        f"from {len(manifest.sources) - len(rejected)} of {len(manifest.sources)} files: {folder}"
    ]
    for shape in manifest.shapes:
        lines.append(
            f"  {shape.split:5} {shape.frames}x{shape.height}x{shape.width}: "
            f"{shape.samples} samples of {shape.tokens} tokens"
        )
    if rejected:
        lines.append(f"{len(rejected)} files were rejected:")
        lines += [f"  {source.path}: {source.reason}" for source in rejected]
    return lines
