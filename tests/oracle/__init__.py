"""The independent reference: NumPy in double precision, written from docs/method.md and not from the native code.

schedule   which layers cut, how many tokens stay, in which order (pure arithmetic)
rounding   what a KV cache of a given type does to a number
attention  the span-attention op
llama      a LLaMA decoder read from a GGUF, with pruned prefill and decode
"""
