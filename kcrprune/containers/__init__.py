"""Bytes to named tensors, from any kind of file; knows no network."""
