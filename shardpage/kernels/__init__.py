"""Pallas TPU kernels: `decode` attends over pages, `write` puts tokens into them."""
