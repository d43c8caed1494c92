"""The state directory: what lies in it, who owns it, and how a file there survives a power cut."""
