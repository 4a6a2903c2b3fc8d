"""Exact nearest codes: a prefilter in bfloat16 with proven bounds, float64 between the few that are left."""
