"""Models as Hugging Face stores them: configurations, tensors and tokenizers, both ways."""
