"""The only room that imports torch.distributed or deepspeed: the grid of ranks, collectives, engines, checkpoints."""
