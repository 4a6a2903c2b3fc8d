"""Drawn data: labelled pictures by arithmetic, and the shards that hold them."""
