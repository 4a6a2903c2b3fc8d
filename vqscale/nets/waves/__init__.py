"""The networks of waves: SEANet and Vocos around a quantizer, and their discriminators."""
