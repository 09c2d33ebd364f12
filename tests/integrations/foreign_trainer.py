"""A trainer as others write them for SGLang, without a line of Tokasaurus: a program for tests.

    python foreign_trainer.py URL CHECKPOINT MODE PORT

It sends the checkpoint's tensors, in three messages. MODE says what it does instead: ``die`` in the
second message, be ``silent`` in it, or send a ``short`` tensor there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

GROUP = "weight_update_group"


def post(url: str, path: str, body: dict) -> tuple[int, dict]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def posting(url: str, path: str, body: dict, answers: list) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(post(url, path, body)), daemon=True)
    thread.start()
    return thread


def make_group(port: int, world_size: int):
    limit = timedelta(seconds=30)
    found = rendezvous(f"tcp://127.0.0.1:{port}", 0, world_size, timeout=limit)
    store, rank, world_size = next(found)
    store.set_timeout(limit)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        "gloo",
        dist.PrefixStore(GROUP, store),
        group_name=GROUP,
        timeout=limit,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def main() -> None:
    url, checkpoint, mode, port = sys.argv[1:]
    with urllib.request.urlopen(f"{url}/get_world_size") as answer:
        world_size = 1 + json.loads(answer.read())["world_size"]
    place = {
        "master_address": "127.0.0.1",
        "master_port": int(port),
        "rank_offset": 1,
        "world_size": world_size,
        "backend": "gloo",
    }
    answers: list = []
    joining = posting(url, "/init_weights_update_group", place, answers)
    group = make_group(int(port), world_size)
    joining.join()
    tensors = list(load_file(f"{checkpoint}/model.safetensors").items())
    third = len(tensors) // 3 + 1
    for number in range(3):
        some = tensors[number * third : (number + 1) * third]
        body = {
            "names": [name for name, _ in some],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in some],
            "shapes": [list(tensor.shape) for _, tensor in some],
            "weight_version": "foreign",
            "timeout_s": 2 if number == 1 and mode != "send" else 30,
        }
        updating = posting(url, "/update_weights_from_distributed", body, answers)
        if number == 1 and mode == "die":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1 and mode == "silent":
            updating.join()
            break
        for index, (_, tensor) in enumerate(some):
            if number == 1 and mode == "short" and index == len(some) - 1:
                tensor = tensor.reshape(-1)[:-1].clone()
            dist.broadcast(tensor, group=group, group_src=0)
        updating.join()
        if answers[-1][0] != 200:
            break
    print(json.dumps(answers), flush=True)
    os._exit(0)  # the group may wait for what never comes


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
