"""The engines that are compared, each a module with `start(...)`, which gives a function `serve`, and `VERSIONS_OF`.

    serve(prompts, lengths) -> times

It answers prompts of token ids greedily, each with so many tokens whatever these are, all of them waiting from the
beginning on, and tells of each prompt the seconds from then to each of its tokens. Nothing is cached from call to call.
"""
