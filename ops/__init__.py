"""Device kernels, one subject a file: Triton beside the PyTorch twin that defines it. Knows no model."""
