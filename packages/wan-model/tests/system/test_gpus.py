import pytest

from wan_model.system.gpus import peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("A100-SXM4-40GB", 312.0),  # as older drivers say it
        ("NVIDIA H100 MIG 1g.10gb", None),
        ("NVIDIA GB300", None),
        ("", None),
    ],
)
def test_cards_of_one_generation_differ(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
