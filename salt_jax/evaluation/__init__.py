"""Evaluation of trained models: held-out rows, few-shot tasks, generated responses."""
