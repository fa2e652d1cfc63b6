"""python3 ask.py PATH [BODY [KEY]]: asks 127.0.0.1:8000; prints the status, then lines as they come.

With a body it is a POST. Where nobody listens the status is 0.
"""

import http.client
import sys

path, body, key = (*sys.argv[1:], "", "")[:3]
headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=100)
try:
    connection.request("POST" if body else "GET", path, body or None, headers)
except ConnectionRefusedError:
    print(0)
    sys.exit()
response = connection.getresponse()
print(response.status, flush=True)
for line in response:
    print(line.decode(), end="", flush=True)
