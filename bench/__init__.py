"""Benchmarks: every step, the top-k and whole iterations beside the plain torch a user would write, in one run.

    python3 -m pytest bench --benchmark-json=raw.json          measure (--device cuda, --sizes all, --networks all, --bench-threads N)
    python3 -m bench.report --save raw.json bench/results      keep what matters under bench/results/<device>/
    python3 -m bench.report bench/results/<device>             print tables and targets, draw times.png and roofline.png beside the results
    python3 -m bench.readme                                    put the tables into README.md and the pages under docs
    python3 -m bench.pictures                                  draw docs/pictures

test_steps, test_topk and test_iterations are the rows; workload and networks what is timed; peers and cub who is compared; gpu_clock and
conftest how; studies of one question each are in `studies`, and what pages show in `pages` and `pictures`. NOTES.md says what is expected.
`bip-fast bench` is the short form, for a machine that has only the package.
Results are committed; the tables and pictures of the documentation are made from them.
"""
