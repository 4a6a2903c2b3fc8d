"""What outlives a process: files, manifests, checkpoints, locks. Data from outside never runs code."""
