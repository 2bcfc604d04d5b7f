"""Our own file: what stays of a network on disk, and what others get of it."""
