"""What touches the device: a step's inputs, its jitted stages, sampling, and operations on pages."""
