"""The commands of the console, one file each: its `Options`, and `run`, which does it.

They import what they need when they run, so that help and completion are quick.
"""
