"""Samples in WebDataset tars as they lie: patterns, headers, one index, readers that read at an offset."""
