"""How a step is made: from what the user gave to what the kernels are given. Knows nothing of experiments, export or commands."""
