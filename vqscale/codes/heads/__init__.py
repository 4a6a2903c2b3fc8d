"""Vocabularies of priors: rows over the code axis that embed, score and draw ids; logits are not gathered."""
