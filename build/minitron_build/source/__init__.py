"""The Hugging Face side: finding, downloading and strictly reading a source checkpoint."""
