"""What papers claim: files with their rules, what comes before their studies, and the verdicts of what came out."""
