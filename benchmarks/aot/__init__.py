"""The kernels compiled ahead of time for chips that are not there, and what the compilers say about them.

    python -m benchmarks.aot gpu       every case for H100 and A100, through Triton and ptxas
    python -m benchmarks.aot tpu       every case for v5e and v6e, through Mosaic
    python -m benchmarks.aot report    the two results as docs/aot.md; exit status 1 if anything fails

`make aot` does all three, each platform in a virtual environment of its own: two device plugins in one environment get
in each other's way.
"""
