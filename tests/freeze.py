"""Imported last by the server of tests.forked: what is there by then stays, and no forked process looks through it for garbage."""

import gc

gc.collect()
gc.freeze()
