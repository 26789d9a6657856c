"""The NVIDIA backend: kernels in Pallas for Triton."""
