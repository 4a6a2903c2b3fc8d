"""Plain network modules: no ranks, no codes."""
