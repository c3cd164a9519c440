"""Benchmarks: every op, a block and a whole model against the same thing written in other ways.

``python -m benchmarks.run`` (``make bench``) measures and reports; the ``bench_*.py`` files are also pytest-benchmark
files (``pytest benchmarks``).
"""
