"""Parameters to parameters: put adapters on a tree, part it, fold them in."""
