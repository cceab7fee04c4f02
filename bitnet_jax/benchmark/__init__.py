"""Speed of text generation on a CPU, measured as its users get it, by turns with other programs.

settings    what is measured, and what cannot be
processes   one measurement is one process, on cores of its own
worker      what such a process does
session     all measurements, in order; what is done is not done again
results     the file of everything that was measured
traffic     bytes that a step must read
energy      joules, where the machine counts them
table       what a user sees

The process that starts the others imports no JAX: the system counts its memory as its children's until they run their own program.
"""
