"""A container's limits, through cgroup v1 or v2."""
