"""The TPU backend: kernels in Pallas for Mosaic."""
