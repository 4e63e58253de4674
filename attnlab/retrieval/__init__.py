"""Retrieval over long contexts: an untrained probe of the ops, tasks, small models, evaluation."""
