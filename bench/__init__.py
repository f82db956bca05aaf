"""Benchmarks: every step and the top-k beside the plain torch a user would write, in one run.

    python3 -m pytest bench --benchmark-json=raw.json          measure (--device cuda, --numel N, --bench-threads N)
    python3 -m bench.report --save raw.json bench/results      keep what matters under bench/results/<device>/
    python3 -m bench.report bench/results/<device>             print the table, write the chart beside the results

Results are committed; the tables and charts in README.md are made from them.
"""
