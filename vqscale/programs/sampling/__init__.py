"""Samples of a prior: what is asked for, drawn into a folder that grows, known ids kept; sweeps of options."""
