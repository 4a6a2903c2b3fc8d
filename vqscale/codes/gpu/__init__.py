"""The passes over rows as fused Triton kernels: same signatures, same answers as the plain ones."""
