"""Diffusion posterior samplers of others, written from their papers, that quality/ compares with.

Both take any denoiser D(x, sigma) and any LinearOperator. A function evaluation (NFE) is one denoised image.
"""
