"""Studies: one base run and its dials, each combination a run; where they run, what is done after, what is written."""
