"""How the stand-in behaves. This folder is not in the real vLLM."""
