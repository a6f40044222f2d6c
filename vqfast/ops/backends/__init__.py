"""Backends: each turns an op's tensors into a call of its kernels. registry.py says what a backend module offers."""
