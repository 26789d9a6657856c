"""Structured outputs: what an answer's text must be, and which tokens keep it so.

    params            what a request says: a JSON schema, a regular expression, a choice, a grammar
    response_format   the same in OpenAI's words
    tool_calls        where tools may be called, or must
    schema_faults     where in a schema that is not supported the fault lies
    exact_schema      what would be taken but not kept to
    schema_parts      the schemas inside of a schema
    vocabulary        the grammars of one model's vocabulary, compiled
    matcher           how far one sequence has come in its grammar, and the tokens that may follow

The grammars themselves are llguidance's. Host side only.
"""
