"""What is known of NVIDIA's GPUs by the names that ``torch.cuda.get_device_name`` gives them."""

# Dense bf16 TFLOP/s with fp32 accumulation, from NVIDIA's data sheets. By the whole name, because cards of one
# generation differ: an H100 PCIe has three quarters of an SXM's.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100 80GB HBM3": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "GH200 480GB": 989.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H20": 148.0,
    "A100-SXM4-80GB": 312.0,
    "A100-SXM4-40GB": 312.0,
    "A100 80GB PCIe": 312.0,
    "A100-PCIE-40GB": 312.0,
    "A800-SXM4-80GB": 312.0,
    "A800 80GB PCIe": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10": 125.0,
    "RTX 6000 Ada Generation": 364.0,
    "RTX A6000": 155.0,
    "GeForce RTX 5090": 210.0,
    "GeForce RTX 4090": 165.0,
    "GeForce RTX 3090": 71.0,
}


def peak_tflops(name: str) -> float | None:
    """The peak of a GPU in dense bf16 TFLOP/s; None if it is not known.

    Args:
        name: as ``torch.cuda.get_device_name`` returns it, such as ``NVIDIA H100 80GB HBM3``.
    """
    return _PEAK_TFLOPS.get(name.removeprefix("NVIDIA ").strip())
