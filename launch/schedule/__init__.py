"""What the TPU compiler makes of the attention kernels, read without a TPU."""
