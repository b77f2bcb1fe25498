"""Metered LMs against a provider on a real socket, through DSPy's native client and through LiteLLM."""
