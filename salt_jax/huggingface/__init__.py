"""Import and export of Hugging Face models: configurations, tensors and tokenizers."""
