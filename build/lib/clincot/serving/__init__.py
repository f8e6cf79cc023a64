"""The model server.

It offers the visual chain of thought over the OpenAI, KServe V1 and KServe V2 protocols. The chain itself is in
clincot.generation.visual_cot; rollouts are in clincot.deployment.
"""
