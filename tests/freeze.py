"""The server of tests.forked imports this module last: it freezes all existing objects, so that the garbage
collector of a forked process does not visit them."""

import gc

gc.collect()
gc.freeze()
