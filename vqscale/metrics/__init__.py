"""Numbers by which tokenizers, priors and samples are judged."""
