"""The only room that imports torch.distributed: the grid of ranks, collectives with gradients, starting processes."""
