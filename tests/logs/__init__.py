"""Logs: no line is lost or doubled, whatever happens to the copier, the disk and the files; and how they are read."""
