"""Models of the families that people run, tiny and with random weights, against Hugging Face's own layers.

recipes    a model of each family, made by Hugging Face's classes
others     decoders that are not pruned
convert    upstream's converter on them, in a process of its own
media      a small tower around each; pixtral, minicpm and whole: those of other families
reference  their layers in double precision as the oracle of a pruned prompt
"""
