"""Encoder, quantizer and decoder as one module: its config, its files, published checkpoints."""
