"""What a process takes of 52 million weights, against its plan: bytes, at most while the weights are
loaded, then with gradients, moments and the sampler, and at most in a step. Run by test_shard.py, in the
two processes that torchrun has started:

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/two_processes_memory.py FOLDER HOW
"""

import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed.fsdp

import train
from model import Transformer, count_parameters, load_weights
from plumbing import memory
from plumbing.distributed import gather, join
from plumbing.pretrained import open_pretrained, save
from plumbing.settings import Settings
from tasks import load_task
from two_processes_shard import OWN_TASK

CONFIG = dict(
    model_type="qwen2",
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)
SMALL = dict(
    task=OWN_TASK,
    prompts=2,
    samples=4,
    minibatch=2,
    micro_tokens=256,
    max_new_tokens=16,
    slots=4,
    eval_problems=2,
    eval_samples=1,
    final_samples=1,
    recompute=True,
    skip_zero=False,
)
CPU = torch.device("cpu")


class Watch:
    """The largest amount of memory of this process, looked at every 5 ms; without what
    only stands for files."""

    def __init__(self) -> None:
        self.most = 0
        threading.Thread(target=self.look, daemon=True).start()

    def look(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.005)

    def now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def main() -> None:
    folder = Path(sys.argv[1])
    how = sys.argv[2]
    rank, _ = join()
    if rank == 0 and not (folder / "large").exists():
        torch.manual_seed(0)
        model = Transformer(CONFIG)
        model.eos_ids = (0,)
        save(model, open_pretrained("base").tokenizer, folder / "large")
        del model
    gather(None)

    # What a process is without weights: libraries (FSDP2 is imported above), the task, the tokenizer.
    s = Settings(**SMALL, model=str(folder / "large"), shard=how == "sharded")
    load_task(s.task, s.data, s.test_data, s.template, date=s.date)
    open_pretrained(s.model)
    gc.collect()
    watch = Watch()
    empty = watch.now()

    model = load_weights(open_pretrained(s.model), CPU, torch.float32, sharded=s.shard)
    found = {"loading": max(watch.most, watch.now()) - empty}
    del model
    gc.collect()
    learner = train.prepare(s)
    gc.collect()
    found["prepared"] = watch.now() - empty
    train.training_step(1, learner, s)
    watch.most = 0
    train.training_step(2, learner, s)
    found["step"] = max(watch.most, watch.now()) - empty

    parameters = count_parameters(CONFIG)
    length = learner.sampler.max_length
    planned = memory.TrainingMemory(CONFIG, parameters, s, length, s.slots, CPU)
    always = planned.always()
    found["planned loading"] = always["weights"]
    found["planned prepared"] = sum(always.values())
    found["planned step"] = max(planned.needs())
    (folder / f"{how}-{rank}.json").write_text(json.dumps(found))
    gather(None)


main()
