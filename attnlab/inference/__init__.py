"""Generation with the hybrid model: prefill, decoding steps, sampling, streams of text."""
