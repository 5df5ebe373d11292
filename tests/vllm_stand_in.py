"""A stand-in for a server of vLLM: a real HTTP server in a process of its own, which answers in vLLM's format.

What it says of a text is what transformers' own forward pass gives. `engine_tests/test_vllm.py` compares with vLLM
itself. Run as a script it serves the embedded model. A file of such a name in its folder makes it misbehave:

    busy        every answer is HTTP 503
    top_only    the log-probability of the likeliest token alone, as a top-k without the actual one
    none        no prompt_logprobs at all
    other       as if it served another model
    renamed     as if it served a model of another name
    slow        each request takes so many seconds
    cached      tokens of a beginning that it has seen before are off by so many nats, in blocks of 16 tokens
    ruled_out   this token is never written
    batched     texts after the first of a request are off by so many nats at their last token
"""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME, WINDOW = "served-stories", 512


class Server:
    """One in a process of its own, from a test. port: the same again after `kill` and `start`."""

    def __init__(self, folder):
        self.folder, self.port, self.process = Path(folder), 0, None
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, __file__, str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def misbehave(self, how, value=""):
        (self.folder / how).write_text(str(value))

    def behave(self):
        for path in self.folder.iterdir():
            path.unlink()

    def requests(self):
        """How many requests for completions it has answered since it was started, and the most at a time."""
        import httpx

        return httpx.get(f"{self.url}/counts").json()


def serve(folder, port):
    import torch

    from mlppl.models import load_model

    torch.set_num_threads(1)
    model, tokenizer, _ = load_model("tiny-stories")
    lock, counts = threading.Lock(), {"now": 0, "most": 0, "answered": 0}
    seen = set()

    def asked(how):
        path = Path(folder, how)
        return path.read_text() or "1" if path.exists() else None

    def entries(ids, place):
        with lock, torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        if asked("other"):
            logprobs = logprobs / 2
        if token := asked("ruled_out"):
            logprobs[:, int(token)] = -9999.0  # as vLLM writes minus infinity
        blocks = [tuple(ids[:end]) for end in range(16, len(ids) + 1, 16)]
        if off := asked("cached"):
            logprobs[: 16 * len(seen.intersection(blocks))] -= float(off)
        if place and (off := asked("batched")):
            logprobs[-2] -= float(off)  # gives the last token's
        seen.update(blocks)
        found = [None]
        for row, actual in zip(logprobs[:-1], ids[1:], strict=True):
            token = int(row.argmax()) if asked("top_only") else actual
            found.append({str(token): {"logprob": float(row[token]), "rank": 1, "decoded_token": ""}})
        return None if asked("none") else found

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if self.path == "/counts":
                self.answer(counts)
            else:
                self.answer({"object": "list", "data": [{"id": NAME, "max_model_len": WINDOW}]})

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                ids = tokenizer(content["prompt"], add_special_tokens=content["add_special_tokens"])["input_ids"]
                self.answer({"count": len(ids), "max_model_len": WINDOW, "tokens": ids})
                return
            with lock:
                counts["now"] += 1
                counts["most"] = max(counts["most"], counts["now"])
            time.sleep(float(asked("slow") or 0))
            status, answered = self.completions(content)
            with lock:
                counts["now"] -= 1
                counts["answered"] += 1
            self.answer(answered, status)

        def completions(self, content):
            if asked("busy"):
                return 503, {"error": {"message": "loading"}}
            if content["model"] != NAME or asked("renamed"):
                return 404, {"error": {"message": f"The model `{content['model']}` does not exist."}}
            assert (content["temperature"], content["max_tokens"]) == (1.0, 1)
            for ids in content["prompt"]:
                if len(ids) + 1 > WINDOW:
                    return 400, {"error": {"message": f"maximum context length is {WINDOW} tokens"}}
                if max(ids) >= len(tokenizer):
                    return 400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary"}}
            choices = [
                {"index": index, "text": "", "prompt_logprobs": entries(ids, index)}
                for index, ids in enumerate(content["prompt"])
            ]
            return 200, {"object": "text_completion", "model": NAME, "choices": choices[::-1]}

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "rl_training" / "examples"))
    serve(sys.argv[1], int(sys.argv[2]))
