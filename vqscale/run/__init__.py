"""What every program shares: its folder, its processes, requests to stop, a profile."""
