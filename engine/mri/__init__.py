"""Multi-coil MRI, from a scanner's file to an uncertainty map: see `reconstruct_scan`."""

from alpenglow.mri.job import ScanJob
from alpenglow.mri.scan import reconstruct_scan
from alpenglow.mri.slices import SliceProblem, prepare_slice

__all__ = ["ScanJob", "SliceProblem", "prepare_slice", "reconstruct_scan"]
