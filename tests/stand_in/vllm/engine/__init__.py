"""What an engine is made of."""
