"""What `python3 -m bench.readme` puts into pages beside the tables of single result files: headlines, files, options, excerpts of code."""
