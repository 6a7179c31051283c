"""Functions to functions: `lora` replays a program with adapted kernels in it."""
