"""`lumina serve`: OpenAI's HTTP interface and a chat page in front of one model.

One thread runs the model (engine.py); everything else is asynchronous and never waits for it. Needs the extra `serve`.
"""
