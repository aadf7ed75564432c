"""One module per command of `mole`: its options, its words, and a call into the library.

Heavy imports stand inside the functions, so that `mole COMMAND --help` is fast as well.
"""
