"""What an adapted kernel is: axes, factors, nodes. Knows no function and no tree."""
