"""The token cache: ids of a data set under one tokenizer, as plain zarr v3; written once, sealed, streamed."""
