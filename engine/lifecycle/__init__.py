"""A container's life: create, start, stop, release, each step written down before the next begins."""
