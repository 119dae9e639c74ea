"""The program `vllm`."""
