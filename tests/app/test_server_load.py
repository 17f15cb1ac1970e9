"""The server under load: several clients at once, short and long requests, some of them dropped midway.

    python -m pytest tests/app/test_server_load.py
    SERVER_REQUESTS=2000 python -m pytest -s tests/app/test_server_load.py     takes some minutes, prints figures
"""
import json
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch
from serving import expected, make_served, running, wait
from soak import memory_in_use
from tiny import save_everything

from app.api import Served
from sampling import Sampling

REQUESTS = int(os.environ.get("SERVER_REQUESTS", "80"))
CLIENTS = 8
MAX_GROWTH = 8e6  # bytes; a leak of a request's text, ids or task would be more in 2,000 requests


class Load:
    """What the clients share."""

    def __init__(self, url: str, talk: list[dict]) -> None:
        self.url = url
        self.todo = list(enumerate(talk))
        self.lock = threading.Lock()
        self.texts: dict[int, str] = {}
        self.ids: list[str] = []
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while True:
                with self.lock:
                    if not self.todo:
                        return
                    number, fields = self.todo.pop()
                outcome = self.ask(http, number, dict(fields))
                with self.lock:
                    self.outcomes[outcome] += 1

    def ask(self, http: httpx.Client, number: int, fields: dict) -> str:
        drop = fields.pop("drop")
        if drop and not fields["stream"]:
            try:
                http.post("/v1/completions", json=fields, timeout=drop)
            except httpx.TimeoutException:
                return "dropped"
            return "answered before it was dropped"
        with http.stream("POST", "/v1/completions", json=fields) as answer:
            assert answer.status_code == 200, answer.read()
            if not fields["stream"]:
                whole = json.loads(answer.read())
                self.ids.append(whole["id"])
                self.texts[number] = whole["choices"][0]["text"]
                return "answered"
            pieces = []
            for line in answer.iter_lines():
                if line in ("", "data: [DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                pieces.append(chunk["choices"][0]["text"])
                if drop and len(pieces) > 2:
                    return "dropped"
            self.ids.append(chunk["id"])
            self.texts[number] = "".join(pieces)
            return "answered" if not drop else "answered before it was dropped"


def requests(count: int, seed: int) -> list[dict]:
    """Prompts of 1 to 200 bytes, a third of them conversations that grow; a tenth is dropped midway."""
    dice = random.Random(seed)
    talk: list[int] = []
    made = []
    for _ in range(count):
        if dice.random() < 1 / 3:
            talk = talk + [dice.randrange(97, 123) for _ in range(dice.randint(1, 20))]
            talk = talk if len(talk) < 200 else talk[:9]
            prompt = talk
        else:
            prompt = [dice.randrange(97, 123) for _ in range(dice.choice((1, 5, 30, 200)))]
        how = dice.choice(({}, {"temperature": 0.5}, {"temperature": 1, "top_p": 0.9}, {"temperature": 2, "top_k": 9}))
        made.append({"prompt": prompt, "max_tokens": dice.choice((1, 3, 8, 20)), "seed": dice.randrange(9), **how,
                     "stream": dice.random() < 0.5, "drop": dice.random() < 0.1 and dice.choice((0.001, 0.02, 0.1))})
    return made


def right_text(reference: Served, fields: dict) -> str:
    how = {name: fields[name] for name in ("temperature", "top_p", "top_k") if name in fields}
    return expected(reference, fields["prompt"], fields["max_tokens"], Sampling(**how, seed=fields["seed"]))["text"]


@pytest.mark.slow
def test_many_clients(tmp_path: Path) -> None:
    """Fails if among many requests one is lost, answered twice or wrongly, or if something of them is kept."""
    folder = save_everything(tmp_path / "tiny")
    served, reference = make_served(folder), make_served(folder)
    start = time.monotonic()
    memory = []
    totals: Counter[str] = Counter()
    with running(served) as (url, service):
        for part in range(5):
            asked = requests(REQUESTS // 5, part)
            load = Load(url, asked)
            threads = [threading.Thread(target=load.run) for _ in range(CLIENTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait(lambda: not service.jobs)
            totals += load.outcomes
            dropped = sum(n for outcome, n in load.outcomes.items() if outcome == "dropped")
            assert sum(load.outcomes.values()) == len(asked) and len(load.texts) == len(set(load.ids))
            assert len(load.texts) + dropped + load.outcomes["answered before it was dropped"] >= len(asked)
            for number, text in load.texts.items():
                assert text == right_text(reference, asked[number]), asked[number]
            memory.append(memory_in_use(torch.device("cpu")))
        assert service.counts["clients_gone"] > 0 and totals["dropped"] > 0
    print(f"\n{dict(totals)} in {time.monotonic() - start:.0f} s; resident MB after each fifth:",
          *(f"{size / 1e6:.1f}" for size in memory))
    assert memory[-1] - memory[1] < MAX_GROWTH
