"""The two training loops, and the functions that both call."""
