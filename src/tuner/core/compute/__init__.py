"""Building blocks of a fast denoiser: fused projections, norms with rotation, modulation, attention and dtypes."""
