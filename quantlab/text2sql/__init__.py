"""Text2SQL: data rows, the prompt, taking SQL out of what a model wrote, running it safely, comparing results.

No module here needs torch, so predictions made elsewhere can be scored without a model.
"""
