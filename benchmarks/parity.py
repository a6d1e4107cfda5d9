"""Errors of the exported energy gradient by network family and precision, in one run: for docs/export.md.

python -m benchmarks.parity
"""

import argparse
from typing import Any

import onnxruntime
from rich.progress import track

from alpenglow.export.bundle import evaluator
from alpenglow.export.gradient_graph import gradient_graph
from alpenglow.export.onnx_model import in_precision, onnx_model
from alpenglow.export.parity import SIGMAS, measure_parity
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.priors.network import NetworkPrior, Precision
from tests.tiny import randomise

_DDPM: dict[str, Any] = {
    "img_resolution": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1, 2],
    "num_blocks": 2, "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
_NCSN: dict[str, Any] = _DDPM | {
    "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "DDPM++": _DDPM,
    "NCSN++": _NCSN,
    "NCSN++, skip": _NCSN | {"encoder_type": "skip", "decoder_type": "skip"},
}
"""EDM's families (arXiv 2206.00364, table 7; NCSN++'s encoders after arXiv 2011.13456) at a small size."""
PRECISIONS: tuple[Precision, ...] = ("float32", "float16")


def family_prior(name: str) -> NetworkPrior:
    """One with random weights, every one of which matters."""
    network = FAMILIES[name]
    denoiser = EDMDenoiser.from_config({"backbone": "SongUNet", "network": network, "sigma_data": 0.5})
    randomise(denoiser)
    size = network["img_resolution"]
    shape = (network["in_channels"], size, size)
    return NetworkPrior(denoiser, shape, name=name)


def parity(prior: NetworkPrior, precision: Precision) -> dict[str, float]:
    """Largest relative error at each level of the ONNX model as ONNX Runtime runs it; see measure_parity."""
    model = onnx_model(gradient_graph(in_precision(prior, precision)), prior.image_shape)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return measure_parity(prior, evaluator(session))


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines = [
        "| network | precision | " + " | ".join(f"{sigma:g}" for sigma in SIGMAS) + " |",
        "| --- | --- |" + " --- |" * len(SIGMAS),
    ]
    cases = [(family, precision) for family in FAMILIES for precision in PRECISIONS]
    for family, precision in track(cases, "networks"):
        errors = parity(family_prior(family), precision)
        cells = " | ".join(f"{error:.0e}".replace("e-0", "e-") for error in errors.values())
        lines.append(f"| {family} | {precision} | {cells} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
