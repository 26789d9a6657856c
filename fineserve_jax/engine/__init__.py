"""The engine, from its models and settings to the answers of its requests.

engine.py             the engine and its steps: schedule, execute, commit
loop.py               the engine on a thread of its own, for callers on any threads
supervisor.py         going on after steps that fail
isolation.py          which requests make steps fail
tickets.py            what those callers hold: tickets, and the inbox where they wait
iteration.py          outputs of any number of prompts, as they come
intake.py             from prompts and all that goes with them to tickets
engine_config.py      what a user may set of an engine
model_settings.py     the models of an engine that serves several, and what is special about each
load.py               from what names a model, or several, to an engine
build.py              from models and settings to the parts of an engine
memory.py             sizes of memory: given, measured, and written for people
page_shapes.py        geometry and classes of each model's pages
compilation_cache.py  JAX's persistent compilation cache
warm_up.py            compiling ahead what requests can need
prepare.py            a prompt and its options, checked and resolved: a request that can be served
new_weights.py        new weights for a model that is served
residence.py          what is kept on the device: replaced, given back, taken again
checks.py             what can be wrong with a request
precision.py          from the KV precision a request asks for to the formats it is kept in
detokenizer.py        tokens to text one by one, cut at stop strings
request_text.py       the text of a request, decoded when somebody reads it
outputs.py            what comes back to the caller
stats.py              what an engine tells of itself
scoring.py            scores of completions that are given
perplexity.py         perplexity of a text through the engine's cache
quality.py            what KV formats cost, with intervals
output_files.py       whether files that the engine writes can be written
"""
