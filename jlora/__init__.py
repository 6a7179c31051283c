"""LoRA for JAX as a transformation of functions and parameter trees."""
