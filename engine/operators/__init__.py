"""Measurement operators: linear maps A from images to measurements, with the draws that samplers need."""

from alpenglow.operators import coil_noise, kspace_masks
from alpenglow.operators.adapters import from_deepinv, from_sigpy
from alpenglow.operators.base import LinearOperator, Normal, Preconditioner
from alpenglow.operators.cg import CgCount, CgInfo, conjugate_gradient, count_iterations
from alpenglow.operators.diagonal import DiagonalOperator
from alpenglow.operators.fourier import FourierSampling
from alpenglow.operators.general import FunctionOperator, IterativeOperator
from alpenglow.operators.pixel import Denoising, Inpainting
from alpenglow.operators.resampling import SuperResolution
from alpenglow.operators.sense import SenseMRI
from alpenglow.operators.spectral import Convolution, GaussianBlur, MotionBlur

__all__ = [
    "CgCount",
    "CgInfo",
    "Convolution",
    "Denoising",
    "DiagonalOperator",
    "FourierSampling",
    "FunctionOperator",
    "GaussianBlur",
    "Inpainting",
    "IterativeOperator",
    "LinearOperator",
    "MotionBlur",
    "Normal",
    "Preconditioner",
    "SenseMRI",
    "SuperResolution",
    "coil_noise",
    "conjugate_gradient",
    "count_iterations",
    "from_deepinv",
    "from_sigpy",
    "kspace_masks",
]
