"""The process starter: a container is a process group on this host."""
