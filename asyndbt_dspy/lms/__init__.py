"""LM engines for DSPy: the local engine, limits and ledger around any engine, a scripted LM for tests."""
