"""A checkpoint as a server: the visual chain of thought behind OpenAI, KServe V1 and V2 requests."""
