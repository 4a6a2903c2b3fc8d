"""What a run is judged by, and the board on which it is written."""
