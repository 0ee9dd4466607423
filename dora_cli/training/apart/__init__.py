"""A run whose frozen base is apart, in a second process (DLoRA: Gao & Zhang, EMNLP Findings 2024, arXiv 2404.05182).

The *device* (process 0) runs the ordinary loop over adapters, head, data and labels; the *cloud* (process 1) holds the
frozen base model and nothing else, and keeps nothing from one pass to the next.
"""
