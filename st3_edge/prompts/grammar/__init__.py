"""Grammars that an answer must follow: JSON schemas to GBNF, and GBNF checked before native code reads it."""
