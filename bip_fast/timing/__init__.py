"""How long steps take on this machine: the clock, the same steps in plain torch, and the short benchmark."""
