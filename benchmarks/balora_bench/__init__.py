"""``balora bench``: every operation of balora against its peers, held against the reference before it is timed.

``operations`` lists the operations, each described by a module of its own; ``measure`` runs one case of one of them,
``sweep`` many sizes; ``harness`` has the clock, the error budget and the memory; ``cli`` reads the arguments.
"""
