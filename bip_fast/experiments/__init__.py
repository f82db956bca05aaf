"""Whole experiments on public data: what the commands `bip-fast prune` and `compare` and the files in `bench/` run.

``data`` and ``models`` are what is trained on and what is trained; ``methods`` ways to prune; ``runs`` one run, from its settings to its
report; ``compare`` many runs. Nothing in the engine imports this package.
"""
