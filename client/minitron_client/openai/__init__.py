"""An OpenAI-compatible HTTP door in front of the gRPC client (`minitron openai`, extra `[openai]`).

It needs fastapi, uvicorn, jinja2 and prometheus_client; nothing else of the client imports it.
"""
