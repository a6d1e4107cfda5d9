"""Training images from files: a folder of images and stacks, or one stack (NPY, HDF5, NIfTI)."""

import warnings
from pathlib import Path

import torch.utils.data

from alpenglow.distillation.config import DataConfig
from alpenglow.distillation.sources.arrays import Hdf5Stack, NpyImage, NpyStack
from alpenglow.distillation.sources.indexed import IndexedSource
from alpenglow.distillation.sources.nifti import NiftiStack, require_nibabel
from alpenglow.distillation.sources.pictures import TIFF, Picture
from alpenglow.distillation.sources.recent import Recent
from alpenglow.distillation.sources.units import SkipError

PICTURES = (".png", ".jpg", ".jpeg", *TIFF)
NPY, HDF5, NIFTI = (".npy",), (".h5", ".hdf5"), (".nii", ".nii.gz")
STACKS = (*NPY, *HDF5, *NIFTI)

File = Picture | NpyImage | NpyStack | Hdf5Stack | NiftiStack


def read_files(config: DataConfig) -> IndexedSource:
    """The images of the file or folder `config.source`, read as they are drawn.

    An NPY file that is the source itself is a stack, one in a folder an image. Files of a folder that cannot
    be read are skipped: with a count here where the header tells, else as IndexedSource does. Without names
    in `config.held_out` the last 5 % of the files are held out, of a single file the last 5 % of the images.

    Raises ValueError when the place is missing or holds no image that can be read, when a name in
    `config.held_out` is not there, for stacks of another form than [N, H, W], [N, C, H, W] or [N, H, W, C],
    and where IndexedSource does.
    """
    path, recent = Path(config.source), Recent()
    if path.is_dir():
        files = _open_folder(path, config, recent)
    elif path.is_file() and _is(path, STACKS):
        files = [_open(path, config, recent, alone=True)]
    else:
        raise ValueError(
            f"data source {config.source!r} is neither 'fashion-mnist' nor 'brain' nor a folder, nor an "
            "existing .npy, .h5 or NIfTI file"
        )
    if len(files) == 1 and isinstance(files[0], NiftiStack):
        # The last slices of a head are air: nothing would be held out.
        files[0].drop_blank()
    return IndexedSource(
        torch.utils.data.ConcatDataset(files),  # type: ignore[arg-type]
        held_out=_held_out(files, config),
        image_size=config.image_size,
        description=_describe(config, len(files)),
    )


def _open_folder(folder: Path, config: DataConfig, recent: Recent) -> list[File]:
    paths = [path for path in sorted(folder.rglob("*")) if _is_ours(path, folder)]
    if not paths:
        raise ValueError(f"the folder {folder} holds no image file ({', '.join((*PICTURES, *STACKS))})")
    files, unreadable = [], []
    for path in paths:
        try:
            files.append(_open(path, config, recent, alone=False))
        except SkipError as error:
            unreadable.append(str(error))
    if unreadable:
        message = f"{len(unreadable)} of {len(paths)} files in {folder} cannot be read; {unreadable[0]}"
        if not files:
            raise ValueError(message)
        warnings.warn(f"{message}. They are skipped", stacklevel=3)
    return files


def _is(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def _is_ours(path: Path, folder: Path) -> bool:
    # Thumbnails and checkpoints in hidden folders are copies: of held-out images too.
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return _is(path, (*PICTURES, *STACKS)) and not hidden and path.is_file()


def _open(path: Path, config: DataConfig, recent: Recent, *, alone: bool) -> File:
    if _is(path, NIFTI):
        require_nibabel()
        return NiftiStack(path, config.axis, recent)
    if _is(path, HDF5):
        return Hdf5Stack(path, config.dataset)
    if _is(path, NPY):
        return NpyStack(path) if alone else NpyImage(path)
    return Picture(path, recent)


def _held_out(files: list[File], config: DataConfig) -> list[int] | None:
    """The indices of the images of held-out files; None: IndexedSource's own choice."""
    chosen = _held_files(files, config)
    if not chosen:
        return None
    held: list[int] = []
    first = 0
    for file in files:
        if file in chosen:
            held += range(first, first + len(file))
        first += len(file)
    return held


def _held_files(files: list[File], config: DataConfig) -> set[File]:
    missing = set(config.held_out) - {file.path.name for file in files}
    if missing:
        raise ValueError(
            f"held_out names {', '.join(sorted(missing))}; {config.source} holds no such readable file"
        )
    if config.held_out:
        return {file for file in files if file.path.name in config.held_out}
    # Whole files: neighbouring slices of a volume are alike.
    return set(files[-max(1, len(files) // 20) :]) if len(files) > 1 else set()


def _describe(config: DataConfig, files: int) -> str:
    held = f"the files {', '.join(config.held_out)}"
    if not config.held_out and files > 1:
        held = "the last 5 % of the files (at least one)"
    elif not config.held_out:
        held = (
            "the last 5 % of the images (at least one); where neighbours are alike, as slices of a volume "
            "are, the figures below flatter the prior"
        )
    origin = config.attribution or "Their licence is that of their owner."
    crops = f" Random square crops, scaled to {config.image_size} pixels." if config.image_size else ""
    return f"`{config.source}`.{crops} {origin} Held out: {held}."
