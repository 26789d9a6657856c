"""An afternoon's questions to a GPU in one command of nine minutes, on a machine without a network.

    python -m tools.gpu_session.gather FOLDER      beforehand, where there is a network: wheels of what is missing there
    pip install --no-index --find-links FOLDER -r FOLDER/requirements.txt      there
    python -m tools.gpu_session                    there, from the project's root; writes gpu_session.json
    python -m tools.gpu_session --dry-run          anywhere: the same on this machine's CPU, with little of everything

Jobs run one after the other, each in a process of its own and within its share of the time: one that fails or hangs
costs the others nothing, and the file is written anew behind each. First comes whether results are right (kernels
against oracles, a short generation against XLA's), then how fast they come (bandwidth of attention beside a plain copy,
serving in each KV format, and with a real model a whole step). The exit status is 1 if anything is wrong.
"""
