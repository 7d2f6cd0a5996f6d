"""Experiments: gin bindings, run folders, resuming, and the `mq` command.

Everything here is a thin wrapper of the library, which needs none of it.
"""
