"""This engine beside others on one CPU: the same model, prompts, lengths and greedy choice, taking turns in one run.

    python -m benchmarks.peers                                 everything; writes docs/benchmarks.md
    python -m benchmarks.peers --only decode --peers llama     a part of it, against some; prints it

Each engine runs in a process and, the others, in a virtual environment of its own, which are made when they are first
needed. All processes are there from the beginning to the end, and only one of them computes at a time.
"""
