"""Short documents of English-like words, for runs of training."""

import torch

WORDS = ("the", "state", "of", "a", "head", "decays", "with", "each", "token", "it", "sees")


def write_documents(folder, num_words):
    """Put 40 documents of so many words into a folder, and return it."""
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        picks = torch.randint(len(WORDS), (num_words,), generator=generator).tolist()
        (folder / f"{i:02}.txt").write_text(" ".join(WORDS[k] for k in picks))
    return folder
