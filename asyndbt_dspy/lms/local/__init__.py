"""A local language model engine for an optimizer's traffic: many short requests that share long prefixes.

prompts        requests -> token ids (chat template or plain layout)
answers        JSON schema -> forced text, finite choices, free parts
token_tree     the labels of a choice as a tree, scored in one pass
decoding       one answer, step by step
prefix_cache   a radix tree over token ids with a memory bound
layout         what one pass computes: items packed without padding
attention      attention of a packed pass over shared prefixes
admission      who joins the running requests, within the memory bound
batching       the scheduler and its thread
engine         the pair that dspy.LM calls
"""

from asyndbt_dspy.lms.local.loading import local_lm

__all__ = ["local_lm"]
