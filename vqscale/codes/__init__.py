"""All that has K, the number of codes, in its shape: rows over the code axis and what is computed on them."""
