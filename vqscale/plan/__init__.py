"""What a run would cost, on any grid of machines: operations, memory, bytes and seconds, by counting and arithmetic."""
