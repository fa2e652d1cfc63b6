"""The load generator: completion requests against any server with OpenAI's API, and what they took. See command.py."""
