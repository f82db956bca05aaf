"""Studies of one question each, outside of pytest-benchmark: a command that writes JSON under bench/results and prints its table."""
