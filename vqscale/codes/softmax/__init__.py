"""IBQ's path: the softmax of tokens over all codes and its backward pass, in blocks, never tokens x codes."""
