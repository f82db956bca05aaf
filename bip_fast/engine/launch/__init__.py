"""What the kernels are given for a step: tables of addresses and sizes, and the call that starts it."""
