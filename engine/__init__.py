"""alpenglow: calibrated posterior sampling for imaging inverse problems."""
