"""Frozen kernels in 8 or 4 bits: `jlora.quantize`, `jlora.dequantize`."""
