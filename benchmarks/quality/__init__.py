"""`alpenglow bench quality`: reconstructions of held-out images by our methods and by diffusion baselines."""
