"""Ways to prune that can be compared."""
