"""What changes a live model; every verb ends in `_`."""
