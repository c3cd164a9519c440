"""The paper's experiments (arXiv 2306.04640, sections 4 and 5), small enough for two processor cores."""
