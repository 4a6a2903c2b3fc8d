"""From gradients to a step: engines and their optimisers. The only room that imports deepspeed."""
