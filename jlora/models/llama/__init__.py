"""The Llama family: Llama, Mistral, Qwen, Gemma, and their mixtures of experts."""
