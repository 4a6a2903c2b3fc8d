"""Samples in WebDataset tars as they lie: patterns, headers, one index, readers that read at an offset.

Local tars that are not compressed are read where they are. Everything else (a URL, a `pipe:`, a compressed shard) is
first fetched whole, through webdataset's gopen, into a folder of bounded size, and read there: no sample is decoded
from a stream. The rules of patterns and keys are webdataset's (patterns.py, contents.py); the code that goes through a
tar is ours, and says why (tar.py).
"""
