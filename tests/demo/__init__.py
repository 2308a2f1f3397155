"""`make demo`: the whole pipeline on this machine, under load, and checked afterwards.

`run` is the sequence of it; every other module knows one subject: the servers, the programs, the producers and their
ledger, the observers, the view, the check.
"""
