"""From gradients to a step: engines, optimisers, the average of the weights. The only room that imports deepspeed."""
