"""SCQ: convex combinations of codes, exact and relaxed, as the few entries that are not zero; dense.py defines them."""
