"""The OpenAI-compatible server, on Starlette and uvicorn (extra `serve`).

app         which path is answered by which function
endpoints   from a request to an answer: whole, or streamed
asking      a body's bytes to tickets for the engine
streaming   pieces of text to chunks
wire        bodies in, JSON and event streams out; clients that leave, or stop reading
classes     who asks: classes of service by API key
pressure    how many may wait, and for how long
run         the process: uvicorn, signals, the end
"""
