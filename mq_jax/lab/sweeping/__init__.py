"""Sweeps: a study over a space of settings, by one process or many.

`space` and `spec` read what varies, `stacking` and `trials` carry settings
out, those that differ in numbers side by side; `storage` and `ledger` see to
it that each is done once, whoever dies; `running` and `output` do the rest.
"""
