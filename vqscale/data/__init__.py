"""Sources of batches: the order of samples is a pure function, the state of a stream is one number."""
