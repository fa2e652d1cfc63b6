"""What Megatron-LM's bundled command-line client sends and reads, by itself: `python megatron_client.py HOST:PORT`.

Reads a prompt and a number of tokens, again and again until its input ends. Run by test_megatron_api.py, as a
stranger's program: it knows nothing of the service.
"""

import ast
import http.client
import json
import sys
from typing import Any


def ask(address: str, prompt: str, tokens_to_generate: Any) -> str:
    """What the client prints for one request."""
    connection = http.client.HTTPConnection(address, timeout=60)
    body = json.dumps({"prompts": [prompt], "tokens_to_generate": tokens_to_generate})
    connection.request("PUT", "/api", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    if response.status != 200:
        return f"Error {response.status}: {answer['message']}"
    text: str = answer["text"][0]
    return f"Megatron Response: \n{text}"


def main() -> None:
    while True:
        try:
            prompt = input("Enter prompt: ")
            tokens_to_generate = ast.literal_eval(input("Enter number of tokens to generate: "))
        except EOFError:
            return
        print(ask(sys.argv[1], prompt, tokens_to_generate), flush=True)


if __name__ == "__main__":
    main()
