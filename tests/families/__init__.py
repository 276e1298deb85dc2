"""Models of the families that people run, tiny and with random weights, against Hugging Face's own layers.

recipes    a model of each family, made by Hugging Face's classes
convert    upstream's converter on them, in a process of its own
reference  their layers in double precision as the oracle of a pruned prompt
"""
