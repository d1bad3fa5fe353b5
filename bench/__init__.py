"""Benchmarks of the kernels, and the GPU check of their correctness."""
