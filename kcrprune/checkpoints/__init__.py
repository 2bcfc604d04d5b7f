"""Which network a stranger's tensors are."""
