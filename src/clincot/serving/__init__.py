"""The model server: the visual chain of thought behind OpenAI, KServe V1 and V2 requests.

The chain itself is clincot.generation.visual_cot; rollouts are clincot.deployment.
"""
