"""Long, resumable work on many processes: encode, sample, sweep, study. tools/ and the command vqscale start it."""
