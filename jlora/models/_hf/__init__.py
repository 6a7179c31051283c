"""Hugging Face folders, read and written leaf by leaf."""
