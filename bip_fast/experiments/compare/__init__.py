"""Many runs: the grid, its execution, results and pictures."""
