"""The whole method on a small model, from end to end: a world of its own, and the pipeline that runs in it.

This room holds only the world (grammar, tokenizer, scores, training of the small base). What the pipeline needs beyond
that is the library's: `prosocial_ext.direg`, `prosocial_ext.arm`, `prosocial_ext.decoding`, `prosocial_ext.evaluation`.
"""
