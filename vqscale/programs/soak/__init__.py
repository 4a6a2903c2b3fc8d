"""Trainings under attack: kills, stops, damage, full disks; and whether they end like undisturbed ones."""
