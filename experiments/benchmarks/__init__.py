"""Speed and memory, measured against floors of the same machine."""
