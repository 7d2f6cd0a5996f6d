"""Other quantizers on our models and texts, in environments of their own."""
