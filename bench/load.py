"""Load over HTTP on this service or a peer, and its latencies and throughput; service/load does the work.

python -m bench.load --url http://127.0.0.1:8000 --concurrency 1,8,64,256 --processes 4 --out FOLDER/NAME
"""

import sys

from service.load.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], program="python -m bench.load"))
