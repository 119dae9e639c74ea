"""Who uses vLLM, and how."""
