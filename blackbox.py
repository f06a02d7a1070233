"""A policy of the embedded world behind an OpenAI-compatible server, which gives text and nothing else.

    python blackbox.py --port 8000 --policy toxic
    python align.py --model runs/story/aligner --data prompts.jsonl --policy http://127.0.0.1:8000 --out edited.jsonl
"""
import json
import random
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common import UserError, cli, make_parser, number

import toy


def serve(policy="blackbox", port=0):
    """Start a server on 127.0.0.1 that answers as one of toy.POLICIES; gives the server (its .url, its .shutdown()).
    UserError where the port cannot be had."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                prompt = f"\n\nHuman: {request['messages'][-1]['content']}\n\nAssistant:"
                text, status = toy.answer(policy, prompt, random.Random(zlib.crc32(prompt.encode()))), 200
            except UserError as error:
                text, status = str(error), 400
            except (ValueError, KeyError, IndexError, TypeError):
                text, status = 'send {"messages": [{"role": "user", "content": QUESTION}]}', 400
            message = {"error": {"message": text}} if status == 400 else {
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(message).encode())

        def log_message(self, *_):
            pass

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"port {port}: cannot be listened on ({error.strerror}); give another --port") from error
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, help="on 127.0.0.1 (default 8000; 0: any)")
    parser.add_argument("--policy", choices=list(toy.POLICIES), default="blackbox", help="who answers (blackbox)")
    args = parser.parse_args()
    server = serve(args.policy, args.port)
    print(f"answering at {server.url}; Ctrl-C to end", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    cli(main)
