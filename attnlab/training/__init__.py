"""Training of the hybrid model: tokens, packed documents, the optimiser, and one loop."""
