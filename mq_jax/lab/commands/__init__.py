"""The commands of `mq`, a module each, with `add(commands)` for its options.

What is heavy is imported where a command runs: `mq --help` and a mistyped
option answer at once.
"""
