"""A classical denoiser to measure a prior against: non-local means (Buades, Coll and Morel 2005)."""

from torch import Tensor


def tune_non_local_means(noisy: Tensor, images: Tensor, sigma: float) -> float:
    """The least mean squared error over patch sizes and strengths of scikit-image's non-local means.

    noisy and images [N, C, H, W]; channels are denoised together. Raises ValueError without scikit-image.
    """
    try:
        from skimage.restoration import denoise_nl_means
    except ImportError:
        raise ValueError("non-local means needs scikit-image: pip install 'alpenglow[train]'") from None

    # scikit-image's fast mode returns nonsense for one channel beside a channel axis (0.26), and for images
    # that are smaller than its reach.
    reach = min(6, min(images.shape[-2:]) // 4)
    axis = None if images.shape[1] == 1 else 0
    pairs = [
        (x.squeeze(0).double().cpu().numpy(), clean.squeeze(0).double().cpu().numpy())
        for x, clean in zip(noisy, images, strict=True)
    ]

    def mean_square(strength: float, patch: int) -> float:
        total = 0.0
        for x, clean in pairs:
            denoised = denoise_nl_means(
                x, patch_size=patch, patch_distance=reach, h=strength * sigma, sigma=sigma, channel_axis=axis
            )
            total += float(((denoised - clean) ** 2).sum())
        return total / images.numel()

    grid = [(strength, patch) for patch in (3, 5, 7) for strength in (0.3, 0.45, 0.6, 0.8, 1.0)]
    return min(mean_square(*setting) for setting in grid)
