"""Requests and answers as OpenAI's API has them, and rows of a batch like them, with this project's own fields besides.

Form and meaning as in OpenAI's reference of chat completions and of completions. What is asked is honoured or refused.
"""
