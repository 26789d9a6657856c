"""The XLA backend: any platform, the default on CPUs, and what the kernels are compared with."""
