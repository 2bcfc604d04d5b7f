"""The images of a run: opened, transformed, generated, divided into parts and dealt out in batches."""
