"""Benchmarks: every op, a layer and a whole model against the same thing written in other ways.

The `bench_*.py` files are pytest-benchmark files, with the hooks of `conftest.py`; `python -m benchmarks`
(`make bench`) runs each in a process of its own and reports.
"""
