"""What ours is measured against: the same computations as others write them in plain PyTorch, kernels of packages that
are installed, and softmax attention of the same shape as a yardstick.

They share no code with the library; ``tests/benchmarks/test_peers.py`` compares those in PyTorch with
``moduleformer_ext.reference`` in float64, and a race checks every result before it is timed.
"""
