"""The XML header of ISMRMRD, which fastMRI's files carry too: grids and encoding limits."""

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

NAMESPACE = "http://www.ismrm.org/ISMRMRD"


@dataclass(frozen=True)
class Space:
    """A grid: matrix (x, y, z) and field of view (x, y, z) in mm; x is the readout, y the phase encoding."""

    matrix: tuple[int, int, int]
    field_of_view: tuple[float, float, float]


@dataclass(frozen=True)
class ScanHeader:
    """What an ISMRMRD header says of a Cartesian scan.

    encoded: the grid of k-space, with the oversampling of the readout. recon: the grid of the images that
    the scanner shows, cut out of the middle. centre: the phase-encoding step of the middle of k-space.
    receiver_noise_bandwidth: the share of the noise that the receiver passes (Kellman and McVeigh, Magn
    Reson Med 2005). xml: all of it, for whatever else it says.
    """

    encoded: Space
    recon: Space
    centre: int
    trajectory: str
    encodings: int
    receiver_noise_bandwidth: float
    xml: str


def parse_header(xml: str | bytes, source: str) -> ScanHeader:
    """Raises ValueError, which names `source`, for XML that is damaged or lacks the grids."""
    try:
        root = ET.fromstring(xml)
        encoding = _child(root, "encoding")
        encoded, recon = (_space(_child(encoding, name)) for name in ("encodedSpace", "reconSpace"))
        return ScanHeader(
            encoded=encoded,
            recon=recon,
            centre=int(
                _text(encoding, "encodingLimits/kspace_encoding_step_1/center", encoded.matrix[1] // 2)
            ),
            trajectory=str(_text(encoding, "trajectory", "cartesian")).strip().lower(),
            encodings=len(root.findall("{*}encoding")),
            receiver_noise_bandwidth=float(
                _text(root, "acquisitionSystemInformation/relativeReceiverNoiseBandwidth", 1)
            ),
            xml=xml.decode() if isinstance(xml, bytes) else xml,
        )
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"the ISMRMRD header of {source} cannot be read: {error}") from None


def make_header(
    shape: tuple[int, int, int, int], voxel_size: tuple[float, float, float], recon: tuple[int, int]
) -> ScanHeader:
    """The header of k-space [slices, coils, H, W] with voxels (H, W, slice) in mm; `recon`: the images' size.

    Both grids have one voxel size, and the thickness of a slice is its spacing.
    """
    slices, coils, height, width = shape
    root = ET.Element("ismrmrdHeader", xmlns=NAMESPACE)
    ET.SubElement(ET.SubElement(root, "acquisitionSystemInformation"), "receiverChannels").text = str(coils)
    # The schema asks for it; nobody knows it here.
    ET.SubElement(ET.SubElement(root, "experimentalConditions"), "H1resonanceFrequency_Hz").text = "0"
    encoding = ET.SubElement(root, "encoding")
    for name, matrix in (("encodedSpace", (height, width, 1)), ("reconSpace", (*recon, 1))):
        space = ET.SubElement(encoding, name)
        _put(space, "matrixSize", dict(zip("xyz", matrix, strict=True)))
        sides = (float(n * edge) for n, edge in zip(matrix, voxel_size, strict=True))
        _put(space, "fieldOfView_mm", dict(zip("xyz", sides, strict=True)))
    limits = ET.SubElement(encoding, "encodingLimits")
    for name, length, centre in (
        ("kspace_encoding_step_1", width, width // 2),
        ("slice", slices, slices // 2),
    ):
        _put(limits, name, {"minimum": 0, "maximum": length - 1, "center": centre})
    ET.SubElement(encoding, "trajectory").text = "cartesian"
    return parse_header(ET.tostring(root, encoding="unicode"), "this k-space")


def _put(parent: ET.Element, name: str, values: dict[str, Any]) -> None:
    element = ET.SubElement(parent, name)
    for key, value in values.items():
        ET.SubElement(element, key).text = str(value)


def _child(element: ET.Element, path: str) -> ET.Element:
    found = element.find("/".join(f"{{*}}{name}" for name in path.split("/")))
    if found is None:
        raise ValueError(f"it has no {path}")
    return found


def _text(element: ET.Element, path: str, default: Any = None) -> Any:
    """The text at `path`; the default where there is none."""
    found = element.find("/".join(f"{{*}}{name}" for name in path.split("/")))
    return default if found is None or not found.text else found.text


def _space(element: ET.Element) -> Space:
    matrix = tuple(int(float(_child(element, f"matrixSize/{axis}").text or "")) for axis in "xyz")
    sides = tuple(float(_child(element, f"fieldOfView_mm/{axis}").text or "") for axis in "xyz")
    if min(matrix) < 1 or not all(0 < side < float("inf") for side in sides):
        raise ValueError(f"matrix {matrix} and field of view {sides} mm; expected positive numbers")
    return Space(matrix, sides)  # type: ignore[arg-type]
