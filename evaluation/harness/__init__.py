"""Evaluation over Ray Data: prompts, models, generators, judges, and what their numbers say."""
