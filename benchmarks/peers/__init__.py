"""The same computations written as others write them, in plain PyTorch: what ours is measured against.

They are correct and share no code with the library (``tests/benchmarks/test_peers.py`` compares them with
``moduleformer_ext.reference`` in float64); they differ in speed and memory only.
"""
